"""Evaluation with tensors that say they are on a GPU: a tensor left on the CPU ends in an error.

Fake tensors have shapes and devices and no values, so what is decided by values is decided here:
all images are wanted, and all features are finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine import predict
from dvla_fast.engine.build import split_classes
from dvla_fast.engine.config import DemoRun
from dvla_fast.engine.texts import build_texts
from tests.engine.runs import random_model, small_spec


def on_gpu(mode: FakeTensorMode, thing: Any) -> Any:
    """The same with fake tensors in the place of all that it holds."""
    if isinstance(thing, Tensor):
        return mode.from_tensor(thing).to("cuda")
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: on_gpu(mode, getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return dataclasses.replace(thing, **fields)
    return thing


def move_module(mode: FakeTensorMode, module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on_gpu(mode, parameter.detach()))
        for name, buffer in part._buffers.items():
            part._buffers[name] = on_gpu(mode, buffer)


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    monkeypatch.setattr(FakeTensor, "__bool__", lambda self: True)
    monkeypatch.setattr(Tensor, "nonzero", lambda self: torch.arange(self.numel()).unsqueeze(1))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.mark.parametrize("policy", ["beta", "fixed", "mlp"])
@pytest.mark.parametrize("alpha_scope", ["episode", "image"])
@pytest.mark.parametrize("text_scope", ["episode", "class", "candidate"])
def test_evaluation_leaves_nothing_on_the_cpu(
    text_scope: str,
    alpha_scope: str,
    policy: str,
    few_digits: FewShotData,
    tiny: DemoRun,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    texts, facts = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    scopes = {"text_scope": text_scope, "alpha_scope": alpha_scope, "policy": policy}
    model = random_model(small_spec(facts["dim"], **scopes)).eval()
    sampler = EpisodeSampler(few_digits.novel, 5, 1, 3, 0)
    positions = split_classes(few_digits, "novel")
    mode = request.getfixturevalue("mode")  # from here on
    move_module(mode, model)
    monkeypatch.setattr(predict, "split_classes", lambda *_: on_gpu(mode, positions))
    predictor = predict.EpisodePredictor(
        model, on_gpu(mode, few_digits), on_gpu(mode, texts), "novel", visual=True
    )
    found = predictor.predict(sampler, 6)
    assert {len(each.accuracies) for each in found.values()} == {6}
