"""Meta-tuning steps and an evaluation, written from docs/method.md in float64.

From the package come weights, drawn actions and encoded texts; :func:`walk` is the small backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from dvla_fast.data import FewShotData
from dvla_fast.engine.build import split_classes
from dvla_fast.engine.config import EvaluateConfig, MetatuneConfig
from dvla_fast.engine.episode_lists import AuthorsEpisodeSampler
from dvla_fast.engine.evaluate import Contender, Evaluation
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.metatune import parameter_groups
from dvla_fast.engine.predict import LEARNED
from dvla_fast.nn import TextTokens
from dvla_fast.rl import EMABaseline, ReinforceLoss, total_loss
from dvla_fast.semantics import HashedNGramEncoder, encode_bank, load_bank
from tests.engine.runs import random_model, small_spec

BLOCKS = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
GATED, LEVELS = [(2, 1), (3, 0)], torch.tensor([[1.4, 0.6], [0.6, 1.4]], dtype=torch.float64)
WAY, KAPPA, TEMPERATURE, IMAGE_HEADS, TEXT_HEADS = 5, 10.0, 0.2, 2, 4
Weights = dict[str, Tensor]
Gated = tuple[Tensor, Tensor, Tensor]  # tokens, H, which of H are texts


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """softmax(QKᵀ/√D)V of tokens (B, L, heads·D); mask (B, keys)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    shares = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def mean_text(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def batch_norm(x: Tensor, weights: Weights, name: str, training: bool) -> Tensor:
    parts = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(weights[f"{name}.{part}"] for part in parts), training)


def walk(
    weights: Weights, images: Tensor, gate: Callable[[int, Tensor], Gated] | None, training: bool
) -> Tensor:
    """Features (B, d) of images (B, C, H, W); gate(layer, tokens) acts before each gated block."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.conv2d(images, weights["backbone.stem.0.weight"], padding=1)
    x = F.gelu(batch_norm(x, weights, "backbone.stem.1", training))
    for stage, block in BLOCKS:
        name = f"backbone.stage{stage}.{block}"
        if stage == 1:
            y = F.conv2d(x, weights[f"{name}.conv1.weight"], padding=1)
            y = F.gelu(batch_norm(y, weights, f"{name}.norm1", training))
            y = F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1)
            x = F.gelu(x + batch_norm(y, weights, f"{name}.norm2", training))
            continue
        if block == 0:  # halve the map; tokens from here on
            if stage == 3:
                x = x.transpose(1, 2).unflatten(2, (8, 8))
            down = f"backbone.down{stage}"
            x = F.conv2d(x, weights[f"{down}.weight"], weights[f"{down}.bias"], stride=2)
            x = (x + weights[f"backbone.position{stage}"]).flatten(2).transpose(1, 2)
        extra, seen = x[:, :0], torch.ones(len(x), 0, dtype=torch.bool)
        if gate is not None and (stage, block) in GATED:
            x, extra, seen = gate(GATED.index((stage, block)), x)
        seen = torch.cat([torch.ones(x.shape[:2], dtype=torch.bool), seen], 1)
        tokens = norm(torch.cat([x, extra], 1), f"{name}.norm1")
        q, k, v = linear(tokens, weights, f"{name}.qkv").chunk(3, -1)
        fused = attend(q[:, : x.shape[1]], k, v, seen, IMAGE_HEADS)
        x = x + linear(fused, weights, f"{name}.proj")
        y = F.gelu(linear(norm(x, f"{name}.norm2"), weights, f"{name}.mlp.0"))
        x = x + linear(y, weights, f"{name}.mlp.2")
    return norm(x, "backbone.norm").mean(1)


@dataclass
class Gates:
    """The gates of one pass of B images, and what rewards and losses read of each layer."""

    weights: Weights
    text: Tensor  # (B, P, dim), what each image sees
    mask: Tensor  # (B, P)
    levels: Tensor  # (P,)
    pool: Callable[[Tensor], Tensor]  # means of images and texts (B, d) to those of decisions
    decide: Callable[[int, Tensor], Tensor]  # layer and η of decisions to α (B,)
    layers: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, layer: int, z: Tensor) -> Gated:
        weights, name, mask = self.weights, f"gates.{layer}", self.mask
        text = self.text * LEVELS[layer][self.levels][:, None]
        text = linear(text, weights, f"{name}.text_projection")  # H_t
        images, texts = self.pool(z.mean(1)), self.pool(mean_text(text, mask))
        state = [F.layer_norm(x, x.shape[-1:]) for x in (images, texts)]
        state.append(F.cosine_similarity(images, texts, dim=-1)[..., None])
        hidden = F.gelu(linear(torch.cat(state, -1), weights, f"{name}.policy.network.hidden"))
        eta = linear(hidden, weights, f"{name}.policy.network.out")[..., 0]
        alpha = self.decide(layer, eta)[:, None, None]
        query, key, value = linear(text, weights, f"{name}.text_qkv").chunk(3, -1)
        image_key, image_value = linear(z, weights, f"{name}.image_kv").chunk(2, -1)
        everywhere = torch.ones(z.shape[:2], dtype=torch.bool)
        fused = alpha * attend(query, image_key, image_value, everywhere, TEXT_HEADS)
        fused = fused + (1 - alpha) * attend(query, key, value, mask, TEXT_HEADS)
        fused = linear(fused, weights, f"{name}.out_projection")
        mean = mean_text(fused, mask)
        after = z + mean[:, None]
        self.layers.append({"before": z.mean(1), "after": after.mean(1), "mean": mean})
        return after, fused, mask


def step_loss(
    weights: Weights, episodes: dict[str, Tensor], actions: list[Tensor], baseline: Tensor | float,
    alpha_scope: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """L_sup + λ L_RL + the alignment of U, and the rewards (L, E): text scope "episode"."""
    support, query = episodes["support"], episodes["query"]
    count, shots = support.shape[:2]
    images = torch.cat([support, query], 1)
    each = images.shape[1]
    text, mask = (episodes[name].repeat_interleave(each, 0) for name in ("text", "mask"))
    terms = []

    def pool(x: Tensor) -> Tensor:
        """States are those of each image, or of an episode's supports."""
        return x if alpha_scope == "image" else x.unflatten(0, (count, each))[:, :shots].mean(1)

    def decide(layer: int, eta: Tensor) -> Tensor:
        """The actions that were drawn."""
        policy, alpha = (
            Beta(KAPPA * eta.sigmoid(), KAPPA * (-eta).sigmoid()),
            actions[layer].sigmoid(),
        )
        found = policy.log_prob(alpha.flatten()), policy.entropy()
        terms.append([part.reshape(count, -1) for part in found])
        return alpha.reshape(count, -1).expand(count, each).flatten()

    gates = Gates(weights, text, mask, episodes["levels"], pool, decide)

    def logits(features: Tensor) -> Tensor:
        """(E, Q, way): cosines with class means at the temperature."""
        supports, queries = features.unflatten(0, (count, each)).tensor_split([shots], 1)
        one_hot = F.one_hot(episodes["labels"], WAY).double()
        means = one_hot.transpose(1, 2) @ supports / one_hot.sum(1)[..., None]
        return F.cosine_similarity(queries[:, :, None], means[:, None], dim=-1) / TEMPERATURE

    def accuracy(features: Tensor) -> Tensor:
        return (logits(features).argmax(-1) == episodes["truth"]).double().mean(1)

    found = logits(walk(weights, images.flatten(0, 1), gates, True))
    loss = F.cross_entropy(found.flatten(0, 1), episodes["truth"].flatten())
    target = torch.stack([t[y] for t, y in zip(episodes["embedding"], episodes["truth"])])
    rewards = []
    for layer, trace in enumerate(gates.layers):
        mean = trace["mean"].detach().unflatten(0, (count, each))[:, shots:]
        aligned = linear(mean, weights, f"alignments.{layer}")
        cosine = F.cosine_similarity(aligned, target, dim=-1)
        loss = loss + (1 - cosine).mean() / len(GATED)
        gain = accuracy(trace["after"]) - accuracy(trace["before"])
        rewards.append(0.5 * cosine.detach().mean(1) + 1.0 * gain)
    reward = torch.stack(rewards)
    densities, entropies = (torch.stack(part) for part in zip(*terms))
    surrogate = (reward - baseline)[..., None] * densities + 0.2 * entropies
    return loss - 0.1 * surrogate.mean((1, 2)).sum(), reward


@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
def test_meta_tuning_steps(alpha_scope: str) -> None:
    model = random_model(small_spec(32, alpha_scope=alpha_scope)).double().train()
    count = 3
    labels = torch.stack([torch.randperm(WAY).repeat(2) for _ in range(count)])
    truth = torch.randint(WAY, (count, 8))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    looks = draw(WAY, 1, 16, 16)

    mask = torch.ones(count, WAY * 3, dtype=torch.bool)
    mask[1, 4] = False  # a class that lacks an attribute
    episodes: dict[str, Any] = {
        "support": looks[labels] + draw(count, 2 * WAY, 1, 16, 16), "labels": labels,
        "query": looks[truth] + draw(count, 8, 1, 16, 16), "truth": truth,
        "text": F.normalize(draw(count, WAY * 3, 32), dim=-1) * mask[..., None],
        "mask": mask, "levels": torch.tensor([0, 0, 1]).repeat(WAY),
        "embedding": F.normalize(draw(count, WAY, 32), dim=-1),
    }  # fmt: skip
    text = TextTokens(episodes["text"], episodes["levels"], episodes["embedding"], mask)
    config, baseline = MetatuneConfig(backbone_lr=1e-3), EMABaseline(len(GATED)).double()
    optimizer = adamw(parameter_groups(model, config), weight_decay=config.weight_decay)
    moments: dict[str, tuple[Any, Any]] = {}
    level: Tensor | float = 0.0
    for step in (1, 2, 3):
        weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        learned = {name: weights[name].requires_grad_() for name, _ in model.named_parameters()}
        output = model(episodes["support"], labels, episodes["query"], text, way=WAY)
        loss, _ = total_loss(output, truth, text, ReinforceLoss(), baseline)
        Execution().update(loss, optimizer, [(list(model.parameters()), config.clip_norm)])

        actions = [trace.action_logit for trace in output.layers]
        expected, reward = step_loss(weights, episodes, actions, level, alpha_scope)
        assert reward.std() > 0.05  # accuracies move: the improvement is not all zero
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        seen = reward.mean(1, keepdim=True)
        level = seen if step == 1 else 0.9 * level + 0.1 * seen
        gradients = torch.autograd.grad(expected, list(learned.values()))
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        for (name, parameter), gradient in zip(model.named_parameters(), gradients):
            gradient = gradient * min(1.0, config.clip_norm / (length + 1e-6))
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)
            gradient = parameter.grad  # Adam divides: rounding of a tiny gradient would count
            m, v = moments.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
            moments[name] = m, v
            rate = config.backbone_lr if name.startswith("backbone.") else config.lr
            m, v = m / (1 - 0.9**step), v / (1 - 0.999**step)
            moved = learned[name] * (1 - rate * config.weight_decay) - rate * m / (v.sqrt() + 1e-8)
            torch.testing.assert_close(parameter, moved, rtol=1e-12, atol=1e-13)


def cosines(
    weights: Weights, support: Tensor, query: Tensor, text: Tensor, mask: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Of queries and class means (Q, way), and each layer's α, in text scope "candidate".

    Supports, class by class, see their own class's texts and decide by the policy's mean; a query
    goes through once with each class's texts, and meets that class's mean.
    """
    alphas: list[Tensor] = []

    def decide(layer: int, eta: Tensor) -> Tensor:
        alphas.append(eta.sigmoid())
        return alphas[-1].expand(len(support))

    def replay(layer: int, eta: Tensor) -> Tensor:
        return alphas[layer].expand(len(query))

    own = torch.arange(WAY).repeat_interleave(len(support) // WAY)
    gates = Gates(weights, text[own], mask[own], levels, lambda x: x.mean(0), decide)
    features = walk(weights, support, gates, False)
    columns = []
    for c in range(WAY):
        its = torch.full((len(query),), c)
        gates = Gates(weights, text[its], mask[its], levels, lambda x: x, replay)
        candidate, mean = walk(weights, query, gates, False), features[own == c].mean(0)
        columns.append(F.cosine_similarity(candidate, mean[None], dim=-1))
    return torch.stack(columns, 1), torch.stack(alphas)


def test_an_evaluation(few_digits: FewShotData) -> None:
    """The learned gates, on the authors' list."""
    model = random_model(small_spec(512, text_scope="candidate"), seed=2).eval()
    texts = encode_bank(load_bank("digits"), few_digits.class_names, HashedNGramEncoder())
    config = EvaluateConfig(shots=[2], query=3, episodes=8, episode_list="authors")
    images = few_digits.novel
    evaluation = Evaluation([Contender(model, {})], few_digits, texts, config)
    result, record = evaluation.evaluate(AuthorsEpisodeSampler(images, WAY, 2, 3))

    weights = {k: v.double() for k, v in model.state_dict().items()}
    pixels = few_digits.normalise(images.images).double()
    places = [np.flatnonzero(images.labels.numpy() == c) for c in range(len(images.class_names))]
    known, numpy = split_classes(few_digits, "novel"), np.random.RandomState(0)
    shares, truth = [], torch.arange(WAY).repeat_interleave(3)
    assert record.alphas is not None
    for episode in range(config.episodes):
        chosen = numpy.choice(len(places), WAY, replace=False)
        assert record.classes[episode].tolist() == chosen.tolist()
        drawn = torch.tensor(np.stack([numpy.choice(places[c], 5, replace=False) for c in chosen]))
        support, query = pixels[drawn[:, :2].flatten()], pixels[drawn[:, 2:].flatten()]
        text, mask = texts.tokens[known[chosen]].double(), texts.mask[known[chosen]]
        found, alphas = cosines(weights, support, query, text, mask, texts.levels)
        torch.testing.assert_close(record.alphas[0, episode], alphas.float())
        best = found.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-6  # float32 decides alike
        assert torch.equal(record.predictions[LEARNED][0, episode], found.argmax(1))
        shares.append((found.argmax(1) == truth).double().mean().item())
    half = 1.96 * np.std(shares, ddof=1) / math.sqrt(config.episodes)
    reported = [result["accuracy"], result["ci95"]]  # of float32 shares
    assert reported == pytest.approx([np.mean(shares), half], abs=1e-7)
