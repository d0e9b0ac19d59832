"""The terms of the pathwise gradient, from a step, and computed another way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.data import FewShotData
from dvla_fast.engine.config import DemoRun
from dvla_fast.engine.execution import Execution
from dvla_fast.engine.gating import GateTraining
from dvla_fast.engine.metatune_steps import Step
from dvla_fast.engine.texts import build_texts
from dvla_fast.nn import EpisodeOutput
from tests.engine.runs import random_model, small_spec


def slope_of_quantile(logits: Tensor, concentration: float, alpha: Tensor) -> Tensor:
    """dα/dη of draws at their level u = F(α), by differences of SciPy's quantiles."""
    logits, alpha, step = logits.double(), alpha.double(), 1e-4

    def shapes(shift: float) -> tuple[Tensor, Tensor]:
        p = torch.sigmoid(logits + shift)
        return concentration * p, concentration * (1 - p)

    level = scipy.stats.beta.cdf(alpha, *shapes(0.0))
    above, below = (scipy.stats.beta.ppf(level, *shapes(shift)) for shift in (step, -step))
    return torch.from_numpy((above - below) / (2 * step))


@pytest.mark.parametrize(
    ("scope", "text_scope"), [("episode", "episode"), ("image", "episode"), ("image", "candidate")]
)
def test_pathwise_terms_are_slopes_of_the_loss_by_the_policy_logits(
    few_digits: FewShotData, tiny: DemoRun, scope: str, text_scope: str
) -> None:
    texts, _ = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    config = replace(tiny.metatune, objective="pathwise", entropy_weight=0.7)
    model = random_model({**small_spec(512), "alpha_scope": scope, "text_scope": text_scope})
    gates = GateTraining(config, model.train())
    # The last gate decides from no state: else the first one's would reach the loss through it.
    torch.nn.init.zeros_(model.gates[-1].policy.network.out.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = Step(config, model, few_digits, texts, optimizer, gates, Execution(), seed=0)
    calls: list[tuple[Any, EpisodeOutput]] = []
    hook = model.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    figures, _ = step(0)
    hook.remove()

    ((args, output),) = calls
    drawn = [trace.alpha.detach().requires_grad_() for trace in output.layers]
    again = model(*args, way=config.way, alpha=drawn)
    episodes = step._episodes(0)
    loss = F.cross_entropy(again.logits.flatten(0, 1), episodes.query_labels.flatten())
    slopes = torch.autograd.grad(loss, drawn)
    for layer, (gate, trace, slope) in enumerate(zip(model.gates, output.layers, slopes)):
        logits = gate.policy.outputs(trace.state.flatten(0, -2)).flatten().detach()
        alpha = trace.alpha.detach().flatten()
        by_logit = slope_of_quantile(logits, gate.policy.concentration, alpha)
        terms = slope.flatten().double() * by_logit * slope.numel()
        assert terms.abs().max() > 1e-6
        for name, want in (
            ("gradient_variance", terms.var(unbiased=False)),
            ("gradient_mean", terms.mean().abs()),
        ):
            found = figures[name][layer].double()
            torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-9, msg=f"{name} {layer}")
