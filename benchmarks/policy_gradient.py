"""Does the policy-gradient code learn? Problems with known answers, and the tables in the docs.

    python -m benchmarks.policy_gradient

prints how many reward evaluations each objective needs on a bandit, how much each baseline lowers
the variance of the gradient, and what two gated layers learn; tests/rl/test_learning.py asserts
what is claimed of them. With ``--digits`` it prints the variances of a short meta-tuning on the
digits instead, which takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dvla_fast.data import load_digits
from dvla_fast.engine.build import seed_everything
from dvla_fast.engine.config import DemoRun, demo_config
from dvla_fast.engine.metatune import metatune
from dvla_fast.engine.models import backbone_spec, build_model, load_backbone, model_spec
from dvla_fast.engine.pretrain import pretrain
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.stages import StageRun
from dvla_fast.engine.texts import build_texts
from dvla_fast.functional import beta_policy
from dvla_fast.nn import BetaPolicy, RLAGate, frozen_policy
from dvla_fast.rl import (
    EMABaseline,
    LeaveOneOutBaseline,
    PolicyLoss,
    Reference,
    ValueBaseline,
    build_baseline,
    build_objective,
    similarity_reward,
)

KAPPA = 10.0
TARGETS = torch.tensor([0.2, 0.4, 0.6, 0.8])
REFERENCE_ALPHA = 0.5
DRAWS = 8  # of each state, in each step
TOLERANCE = 0.08


def bandit_reward(alpha: Tensor, state: Tensor, spread: float = 0.6) -> Tensor:
    """1 + offset(state) − 4(α − target(state))², with offsets from −spread/2 to spread/2.

    So rewards have a level, and some states pay more than others whatever one does.
    """
    offset = spread * (state / (len(TARGETS) - 1) - 0.5)
    return 1 + offset - 4 * (alpha - TARGETS[state]) ** 2


def best_means() -> Tensor:
    """The mean p of Beta(κp, κ(1 − p)) with the largest expected reward, for each state.

    E[(α − t)²] = p(1 − p)/(κ + 1) + (p − t)², least at p = (2t(κ + 1) − 1)/(2κ).
    """
    return (2 * TARGETS * (KAPPA + 1) - 1) / (2 * KAPPA)


def bandit_states(state: Tensor) -> Tensor:
    """One-hot states in the form of a gate's: (A,) -> (A, 2·4 + 1)."""
    image = torch.nn.functional.one_hot(state, len(TARGETS)).float()
    return torch.cat((image, torch.zeros(len(state), len(TARGETS) + 1)), dim=-1)


class Setting(NamedTuple):
    """An objective with what it goes with."""

    objective: str
    baseline: str = "none"
    updates: int = 1
    rate: float = 0.005
    spread: float = 0.6


SETTINGS = {
    "REINFORCE, no baseline": Setting("reinforce"),
    "REINFORCE, EMA (default)": Setting("reinforce", "ema"),
    "REINFORCE, value network": Setting("reinforce", "value"),
    "REINFORCE, leave-one-out, K = 4": Setting("reinforce", "leave-one-out"),
    "counterfactual, EMA": Setting("counterfactual", "ema"),
    "PPO, EMA, 4 updates": Setting("ppo", "ema", 4),
    "PPO, leave-one-out, 4 updates": Setting("ppo", "leave-one-out", 4),
    "GRPO, K = 4, 4 updates": Setting("grpo", "none", 4),
    "DPO, pairs": Setting("dpo"),
    "pathwise": Setting("pathwise"),
}

# States that pay very differently, learned at twice the rate: not every run arrives.
HARDER = {
    "REINFORCE, EMA, harder": Setting("reinforce", "ema", 1, 0.01, 3.0),
    "REINFORCE, leave-one-out, harder": Setting("reinforce", "leave-one-out", 1, 0.01, 3.0),
    "PPO, EMA, 4 updates, harder": Setting("ppo", "ema", 4, 0.01, 3.0),
    "PPO, leave-one-out, 4 updates, harder": Setting("ppo", "leave-one-out", 4, 0.01, 3.0),
}


def solve_bandit(
    setting: Setting, seed: int, steps: int = 400, *, stop: bool = True
) -> tuple[int | None, Tensor]:
    """Learn the bandit with a policy network, Adam and no entropy bonus.

    Args:
        setting: what learns.
        seed: of network and draws.
        steps: of 32 draws each.
        stop: as soon as the answer is found.

    Returns:
        Reward evaluations until every state's mean is first within ``TOLERANCE`` of the best one
        (None: not within ``steps``), and the means (4,), averaged over the second half of
        ``steps`` (at the end, if stopped before).
    """
    torch.manual_seed(seed)
    policy = BetaPolicy(len(TARGETS), 32, KAPPA)
    policy.pathwise = setting.objective == "pathwise"
    baseline = build_baseline(setting.baseline, [len(TARGETS)], samples=4, hidden_dim=32)
    objective = build_objective(setting.objective, samples=4)
    loss_fn = PolicyLoss(objective, entropy_weight=0.0, weight=1.0)
    learned = [*policy.parameters(), *(() if baseline is None else baseline.parameters())]
    optimizer = torch.optim.Adam(learned, lr=setting.rate)
    frozen = frozen_policy(policy, REFERENCE_ALPHA)
    every, best = torch.arange(len(TARGETS)), best_means()
    state = every.repeat_interleave(DRAWS)  # [32]: draws of one state are consecutive
    states = bandit_states(state)
    evaluations, found, total = 0, None, torch.zeros(len(TARGETS))
    for number in range(steps):
        drawn = policy(states)
        rewards = bandit_reward(drawn.alpha, state, setting.spread)[None]
        evaluations += len(state)
        half = torch.full_like(drawn.alpha, REFERENCE_ALPHA)
        reference = Reference(
            bandit_reward(half, state, setting.spread)[None],
            frozen(states, action_logit=drawn.action_logit).log_prob[None],
        )
        if objective.needs_reference_rewards:
            evaluations += len(state)
        level, step, old = baseline, drawn, drawn.log_prob.detach()[None]
        for update in range(setting.updates):
            if update:
                step = policy(states, action_logit=drawn.action_logit)
            loss, _ = loss_fn(
                step.log_prob[None],
                step.entropy[None],
                rewards,
                level,
                states=[states],
                old_log_prob=old,
                reference=reference,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if update == 0 and baseline is not None and setting.updates > 1:
                baseline.eval()  # an average takes each step in once
        if baseline is not None:
            baseline.train()
        with torch.no_grad():
            means = torch.sigmoid(policy.outputs(bandit_states(every))).squeeze(-1)
        if found is None and bool(((means - best).abs() < TOLERANCE).all()):
            found = evaluations
            if stop:
                return found, means
        if number >= steps // 2:
            total += means
    return found, total / (steps - steps // 2)


def sample_table(seeds: int = 5, steps: int = 400) -> dict[str, list[int | None]]:
    """Evaluations needed by every setting, one number a seed."""
    return {
        name: [solve_bandit(setting, seed, steps)[0] for seed in range(seeds)]
        for name, setting in {**SETTINGS, **HARDER}.items()
    }


def gradient_terms(kind: str, repeats: int = 2000, seed: int = 0) -> Tensor:
    """Estimates of the bandit's policy gradient at p = 1/2, each from one step of 32 draws.

    Args:
        kind: "none", "ema", "value", "leave-one-out" or "counterfactual" (with "ema"); those that
            learn are trained for 400 steps first.
        repeats: number of estimates.
        seed: of the draws.

    Returns:
        (repeats, 4): with respect to the policy's logit in each state.
    """
    torch.manual_seed(seed)
    every = torch.arange(len(TARGETS)).repeat_interleave(DRAWS)
    objective = build_objective("counterfactual" if kind == "counterfactual" else "reinforce")

    def draw(copies: int) -> tuple[Tensor, Tensor, Tensor, Reference]:
        state = every.repeat(copies)
        logits = torch.zeros(1, len(state), dtype=torch.float64, requires_grad=True)
        step = beta_policy(logits, KAPPA)
        half = torch.full_like(step.alpha, REFERENCE_ALPHA)
        rewards = bandit_reward(step.alpha, state)
        return logits, step.log_prob, rewards, Reference(bandit_reward(half, state))

    baseline: nn.Module | None = None
    if kind in ("ema", "counterfactual"):
        baseline = EMABaseline(1, momentum=0.9)
    elif kind == "value":
        baseline = ValueBaseline([len(TARGETS)], hidden_dim=32)
    elif kind == "leave-one-out":
        baseline = LeaveOneOutBaseline(4)
    loss_fn = PolicyLoss(objective, entropy_weight=0.0, weight=1.0)
    if baseline is not None and kind != "leave-one-out":
        learned = list(baseline.parameters())
        optimizer = torch.optim.Adam(learned, lr=0.01) if learned else None
        states = [bandit_states(every)]
        for _ in range(400):
            _, log_prob, rewards, reference = draw(1)
            loss, _ = loss_fn(
                log_prob, log_prob.detach(), rewards, baseline, states=states, reference=reference
            )
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        baseline.eval()
    logits, log_prob, rewards, reference = draw(repeats)
    states = [bandit_states(every.repeat(repeats))]
    loss, _ = loss_fn(
        log_prob, log_prob.detach(), rewards, baseline, states=states, reference=reference
    )
    (gradient,) = torch.autograd.grad(-loss, logits)
    # The loss is the mean over all draws: undo that, then average over each step's own.
    terms = gradient[0].view(repeats, len(TARGETS), DRAWS) * gradient.numel()
    return terms.mean(-1) / len(TARGETS)


def exact_gradient() -> Tensor:
    """Gradient of the mean expected reward with respect to each state's logit at p = 1/2: (4,)."""
    logits = torch.zeros(len(TARGETS), dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(logits)
    loss = 4 * (p * (1 - p) / (KAPPA + 1) + (p - TARGETS) ** 2)
    (gradient,) = torch.autograd.grad(-loss.mean(), logits)
    return gradient


BASELINES = ("none", "ema", "value", "leave-one-out", "counterfactual")


def variance_table(repeats: int = 2000) -> dict[str, float]:
    """Variance of a step's gradient estimate, summed over the states, of each baseline."""
    return {kind: gradient_terms(kind, repeats).var(0).sum().item() for kind in BASELINES}


class TwoLayerProblem:
    """Two gates of which the first should listen to the image and the second to the text.

    Image tokens carry the episode's class before the first gate; a block then drowns them in
    another class, as depth drowns local detail. Text tokens are the class with noise, at both. The
    reward of each gate is the similarity of its fused tokens with the class. Attention is fixed
    (every projection is the identity); the policies learn.

    Args:
        seed: of everything.
    """

    dim, classes, tokens, phrases = 16, 8, 6, 3

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.gates = nn.ModuleList(RLAGate(self.dim, self.dim, 1, hidden_dim=16) for _ in range(2))
        eye = torch.eye(self.dim)
        for gate in self.gates:
            gate.requires_grad_(False)
            gate.policy.requires_grad_(True)
            gate.text_projection.weight.copy_(eye)
            gate.text_projection.bias.zero_()
            gate.text_qkv.weight.copy_(eye.repeat(3, 1))
            gate.image_kv.weight.copy_(eye.repeat(2, 1))
            gate.out_projection.weight.copy_(eye)
        basis = torch.randn(self.classes, self.dim)
        self.basis = torch.nn.functional.normalize(basis, dim=-1)

    def play(
        self, episodes: int, alpha: tuple[float, float] | None = None, sample: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log_prob, entropy, rewards, alpha), each (2, E)."""
        kind = torch.randint(self.classes, (episodes,))
        other = (kind + torch.randint(1, self.classes, (episodes,))) % self.classes
        target = self.basis[kind].unsqueeze(1)  # [E, 1, d]
        image = target + 0.1 * torch.randn(episodes, self.tokens, self.dim)
        text = target + 0.25 * torch.randn(episodes, self.phrases, self.dim)
        clutter = self.basis[other].unsqueeze(1) + 0.1 * torch.randn_like(image)
        steps = []
        for layer, gate in enumerate(self.gates):
            given = None if alpha is None else alpha[layer]
            out = gate(image, text, alpha=given, sample=sample)
            aligned = out.fused.mean(1, keepdim=True)  # [E, 1, d]
            labels = torch.zeros(episodes, 1, dtype=torch.int64)
            reward = similarity_reward(aligned, target, labels)
            steps.append((out.log_prob, out.entropy, reward, out.alpha))
            image = 0.1 * out.image_tokens + clutter
        log_prob, entropy, rewards, alphas = (torch.stack(part) for part in zip(*steps))
        return log_prob, entropy, rewards, alphas

    def best(self, grid: int = 11, episodes: int = 256) -> tuple[float, float]:
        """The best pair of constant gates on a grid over [0, 1]²: the known answer."""
        points = torch.linspace(0, 1, grid).tolist()
        scores = {}
        for pair in itertools.product(points, points):
            torch.manual_seed(0)  # the same episodes for every pair
            with torch.no_grad():
                scores[pair] = self.play(episodes, pair)[2].mean().item()
        return max(scores, key=scores.__getitem__)

    def learn(self, steps: int = 120, episodes: int = 32) -> tuple[float, float]:
        """REINFORCE with EMA; the mean gates of the learned policies."""
        loss_fn, baseline = PolicyLoss(entropy_weight=0.0, weight=1.0), EMABaseline(2)
        learned = [p for gate in self.gates for p in gate.policy.parameters()]
        optimizer = torch.optim.Adam(learned, lr=0.01)
        for _ in range(steps):
            log_prob, entropy, rewards, _ = self.play(episodes)
            loss, _ = loss_fn(log_prob, entropy, rewards, baseline)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            alphas = self.play(256, sample=False)[3].mean(1)
        return alphas[0].item(), alphas[1].item()


RECIPES: dict[str, dict[str, str]] = {
    "none": {"baseline": "none"},
    "ema": {"baseline": "ema"},
    "value": {"baseline": "value"},
    "leave-one-out": {"baseline": "leave-one-out"},
    "counterfactual": {"objective": "counterfactual"},
}


def digits_table(config: DemoRun, folder: Path) -> dict[str, list[float]]:
    """Meta-tune a backbone pre-trained on the even digits with each recipe, from the same start.

    Args:
        config: settings of the demo; every recipe changes its objective or baseline.
        folder: for the runs.

    Returns:
        "gradient_variance" of each gated layer, averaged over the second half of the epochs.
    """
    data = load_digits()
    texts, semantics = build_texts(config.semantics, data, torch.device("cpu"))
    backbone = backbone_spec(config.model, 1, 16)
    spec = model_spec(config.model, backbone, semantics["dim"])
    run = RunFolder(folder / "pretrain", {})
    start = pretrain(config.pretrain, data, backbone, StageRun(run, seed_everything(0)))
    table = {}
    for name, recipe in RECIPES.items():
        rng = seed_everything(1)
        model = build_model(spec)
        load_backbone(model, backbone, start)
        run = RunFolder(folder / name, {})
        settings = dataclasses.replace(config.metatune, **recipe)
        metatune(settings, model, spec, data, texts, StageRun(run, rng))
        rows = run.rows("metatune")
        late = torch.tensor([row["gradient_variance"] for row in rows[len(rows) // 2 :]])
        table[name] = late.mean(0).tolist()
    return table


def print_digits() -> None:
    """Print the table of a short meta-tuning: 8 epochs of pre-training, 48 steps for each row."""
    config = demo_config(quick=True)
    config.pretrain.epochs = 8
    config.metatune.steps_per_epoch = 8
    with tempfile.TemporaryDirectory() as folder:
        table = digits_table(config, Path(folder))
    print("| baseline | variance at stage 2 | at stage 3 |")
    print("|---|---|---|")
    for name, (first, second) in table.items():
        print(f"| {name} | {first:.1e} | {second:.1e} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of docs/reinforcement.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--digits", action="store_true", help="a short meta-tuning instead")
    torch.set_num_threads(1)
    if parser.parse_args(arguments).digits:
        print_digits()
        return
    print("| objective | median reward evaluations | lowest to highest of 5 seeds |")
    print("|---|---|---|")
    for name, counts in sample_table().items():
        found = [count for count in counts if count is not None]
        if len(found) < len(counts):
            print(f"| {name} | – | {len(found)} of {len(counts)} seeds within 400 steps |")
        else:
            print(f"| {name} | {median(found):,.0f} | {min(found):,} to {max(found):,} |")
    variances = variance_table()
    print("\n| baseline | variance of a step's gradient | of that without |")
    print("|---|---|---|")
    for name, value in variances.items():
        print(f"| {name} | {value:.2e} | {value / variances['none']:.3f} |")
    print("\n| seed | best constant pair | learned mean gates |")
    print("|---|---|---|")
    for seed in range(5):
        problem = TwoLayerProblem(seed)
        best, learned = problem.best(), problem.learn()
        print(f"| {seed} | {best[0]:.1f}, {best[1]:.1f} | {learned[0]:.2f}, {learned[1]:.2f} |")


if __name__ == "__main__":
    main()
