"""An evaluation that reads other texts than its checkpoint learned with says so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.cli import main
from dvla_fast.data import FewShotData
from dvla_fast.engine.checkpoint import save_checkpoint
from dvla_fast.engine.config import DemoRun, SemanticsConfig
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.texts import build_texts
from dvla_fast.engine.trained_texts import check_semantics, text_differences

PLAIN = {
    "bank": "animals", "bank_sha256": "a", "encoder": "e", "dim": 8, "top_k": 0, "template": None,
    "parts": "all", "truncated_texts": 0,
}  # fmt: skip


def differences(trained: dict[str, Any], evaluated: dict[str, Any], **options: Any) -> set[str]:
    info = {"dataset": "animals", "semantics": {**PLAIN, **trained}}
    ours = {**PLAIN, **evaluated}
    return set(text_differences(ours, {"a.pt": info}, "animals", **options))


@pytest.mark.parametrize(
    ("trained", "evaluated", "named"),
    [
        ({}, {"top_k": 1, "template": "all"}, {"top_k"}),
        ({"top_k": 2, "template": "all"}, {"top_k": 2, "template": "last"}, {"template"}),
        ({"parts": "name"}, {}, {"parts"}),
        ({"parts": "name", "top_k": 2, "template": "all"}, {"parts": "description"}, {"parts"}),
        ({}, {"bank_sha256": "b"}, {"bank_sha256"}),
        ({}, {"parts": "attributes", "top_k": 1, "template": "all"}, {"parts", "top_k"}),
    ],
)
def test_differences_are_named(trained: Any, evaluated: Any, named: set[str]) -> None:
    with pytest.warns(UserWarning, match="a.pt: its gates learned with other texts"):
        assert differences(trained, evaluated) == named


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ({}, {}),
        ({}, {"truncated_texts": 3}),
        ({"parts": "name"}, {"parts": "name", "top_k": 3, "template": "all"}),
        ({"parts": "description"}, {"parts": "description", "top_k": 3, "template": "all"}),
    ],
)
def test_equal_texts_are_quiet(trained: Any, evaluated: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert differences(trained, evaluated) == set()


def test_what_is_not_compared() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = {**PLAIN, "bank_sha256": "b", "bank": "birds"}
        info = {"dataset": "animals", "semantics": PLAIN}
        assert text_differences(ours, {"a.pt": info}, "birds") == {}  # needs another bank
        assert text_differences(ours, {"a.pt": {"dataset": "animals"}}, "animals") == {}
        assert text_differences({**ours, "top_k": 3}, {"a.pt": info}, "animals", ("parts",)) == {}


def test_each_checkpoint_is_compared() -> None:
    infos = {
        "a.pt": {"dataset": "animals", "semantics": PLAIN},
        "b.pt": {"dataset": "animals", "semantics": {**PLAIN, "parts": "name"}},
    }
    with pytest.warns(UserWarning, match=r"b.pt: .*\(parts was 'name', now 'all'\)"):
        found = text_differences(PLAIN, infos, "animals")
    assert found == {"parts": {"trained": "name", "evaluated": "all"}}


def test_on_the_command_line(tmp_path: Path, few_digits: FewShotData, tiny: DemoRun) -> None:
    spec = model_spec(tiny.model, backbone_spec(tiny.model, 1, 16), 512)
    tensors = {f"model.{name}": value for name, value in build_model(spec).state_dict().items()}
    _, semantics = build_texts(SemanticsConfig(), few_digits, torch.device("cpu"))
    info = {"kind": "metatune", "model": spec, "dataset": "digits", "semantics": semantics}
    save_checkpoint(tmp_path / "m.safetensors", tensors, info)
    arguments = [
        *("evaluate", "--device=cpu", f"--checkpoint={tmp_path / 'm.safetensors'}"),
        *("--evaluate.episodes=2", "--evaluate.shots=[1]", "--evaluate.query=2"),
    ]
    with pytest.warns(UserWarning, match=r"top_k was 0, now 1\); give the --semantics options"):
        assert main([*arguments, f"--output={tmp_path / 'a'}", "--semantics.top_k=1"]) == 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["text_differences"] == {"top_k": {"trained": 0, "evaluated": 1}}
    assert main([*arguments, f"--output={tmp_path / 'b'}"]) == 0
    assert json.loads((tmp_path / "b/summary.json").read_text())["text_differences"] == {}


def test_a_checkpoint_that_says_nothing_of_its_texts() -> None:
    for info in ({}, {"semantics": None}, {"semantics": {}}):
        check_semantics(PLAIN, info, "a.pt")
        assert text_differences(PLAIN, {"a.pt": info}, "animals") == {}
