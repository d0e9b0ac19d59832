"""Training steps on the meta device, which has no values: what would wait for a GPU shows here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine import build, distributed, metatune_steps
from dvla_fast.engine.config import DemoRun
from dvla_fast.engine.execution import Execution
from dvla_fast.semantics import EncodedTexts
from tests.engine import test_execution


class NoWaiting(TorchDispatchMode):
    """Refuses copies from the CPU that a host would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            source, device = args[0], torch.device(kwargs.get("device") or "cpu")
            waits = not kwargs.get("non_blocking", False)
        elif func is torch.ops.aten.copy_.default:
            source, device = args[1], args[0].device
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return func(*args, **kwargs)
        assert not (waits and source.device.type == "cpu" and device.type == "meta"), (
            f"a copy of {tuple(source.shape)} to the device"
        )
        return func(*args, **kwargs)


METATUNING: list[dict[str, Any]] = [  # settings of meta-tuning, and of the model
    {},
    {"model": {"text_scope": "class", "alpha_scope": "image"}},
    {"model": {"text_scope": "candidate", "policy": "categorical"}},
    {"objective": "ppo", "kl_weight": 0.1},
    {"objective": "grpo"},
    {"objective": "counterfactual", "baseline": "value"},
    {"objective": "dpo"},
    {"objective": "pathwise"},
    {"baseline": "leave-one-out"},
    {"backbone_lr": 0.0, "shots": [1, 2]},
]


@pytest.mark.parametrize(
    ("work", "changes"),
    [(test_execution.second_epoch, {}), *((test_execution.second_step, x) for x in METATUNING)],
)
def test_a_step_needs_no_values_of_the_device(
    work: Callable, changes: dict[str, Any], few_digits: FewShotData, tiny: DemoRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tuning = {name: value for name, value in changes.items() if name != "model"}
    tiny = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, **changes.get("model", {})),
        metatune=dataclasses.replace(tiny.metatune, **tuning),
    )
    monkeypatch.setattr(distributed, "pick_device", torch.device)
    # What is read once, before the first step.
    positions = build.split_classes(few_digits, "base")
    monkeypatch.setattr(metatune_steps, "split_classes", lambda *_: positions)
    monkeypatch.setattr(
        metatune_steps, "EpisodeSampler", lambda _, *rest: EpisodeSampler(few_digits.base, *rest)
    )
    monkeypatch.setattr(EncodedTexts, "_full", False)
    monkeypatch.setattr(test_execution, "adamw", torch.optim.AdamW)  # none in one pass for meta
    monkeypatch.setattr(Execution, "autocast", lambda self: contextlib.nullcontext())
    work(torch.device("meta"), few_digits, tiny, NoWaiting())
