"""A run goes on with the images and texts that it began with, or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dvla_fast.data import FewShotData, load_digits
from dvla_fast.engine.ablate import run_ablate
from dvla_fast.engine.config import AblateConfig, AblateRun, DemoRun
from dvla_fast.engine.demo import run_demo
from dvla_fast.engine.inputs import check_inputs, run_inputs
from dvla_fast.errors import CheckpointError, OutputError
from dvla_fast.semantics import load_bank


def write_bank(path: Path, word: str) -> str:
    content = load_bank("digits").to_dict()
    for entry in content["classes"].values():
        entry["description"] = word
    path.write_text(json.dumps(content))
    return str(path)


def test_what_counts(few_digits: FewShotData) -> None:
    first = run_inputs(few_digits, {"bank_sha256": "1"}, "novel")
    assert first == run_inputs(few_digits, {"bank_sha256": "1"}, "novel")
    check_inputs(Path("run"), first, first, "begin anew")
    check_inputs(Path("run"), None, first, "begin anew")  # of a version that noted none
    base = few_digits.base
    moved = base.labels.clone()
    moved[0] = (moved[0] + 1) % len(base.class_names)
    fewer = base.subset(base.labels.new_tensor(range(1, len(base))), base.name)
    darker = dataclasses.replace(base, images=base.images // 2)
    for other in (dataclasses.replace(base, labels=moved), fewer):
        now = run_inputs(dataclasses.replace(few_digits, base=other), {"bank_sha256": "1"}, "novel")
        with pytest.raises(CheckpointError, match=r"^run: .*: the images of the base classes; giv"):
            check_inputs(Path("run"), first, now, "begin anew")
    now = run_inputs(dataclasses.replace(few_digits, base=darker), {"bank_sha256": "1"}, "novel")
    with pytest.warns(UserWarning, match="base images have other pixels"):
        check_inputs(Path("run"), first, now, "begin anew")
    now = run_inputs(few_digits, {"bank_sha256": "2"}, "base")
    with pytest.raises(CheckpointError, match=r"evaluated split and the bank's texts.*or begin"):
        check_inputs(Path("run"), first, now, "begin anew")


def test_training_does_not_go_on_with_another_bank(tiny: DemoRun, tmp_path: Path) -> None:
    tiny.output, tiny.semantics.bank = str(tmp_path / "run"), write_bank(tmp_path / "b.json", "one")
    whole = run_demo(tiny, quiet=True)
    tiny.resume = True
    assert run_demo(tiny, quiet=True)["accuracy"] == whole["accuracy"]
    write_bank(tmp_path / "b.json", "two")
    with pytest.raises(CheckpointError, match=r"metatune-last.*the bank's texts.*new run"):
        run_demo(tiny, quiet=True)


def test_an_ablation_does_not_go_on_with_another_bank(tiny: DemoRun, tmp_path: Path) -> None:
    tiny.semantics.bank = write_bank(tmp_path / "bank.json", "one")
    config = AblateRun(
        output=str(tmp_path / "run"), device="cpu", model=tiny.model, semantics=tiny.semantics,
        pretrain=tiny.pretrain, metatune=tiny.metatune, evaluate=tiny.evaluate,
        ablate=AblateConfig(seeds=1, processes=1, variants=["visual"], draws=100),
    )  # fmt: skip
    config.metatune.backbone_lr = 0.0
    summary = run_ablate(config, quiet=True)
    assert set(summary["inputs"]) == {"base", "monitor", "pixels", "split", "bank"}
    kept = (tmp_path / "bank.json").read_text()
    bank = json.loads(kept)  # the same texts, but images are kept out of the queries now
    bank["classes"]["one"]["images"] = list(load_digits().novel.ids[:30])
    (tmp_path / "bank.json").write_text(json.dumps(bank))
    with pytest.raises(OutputError, match=r"full-seed0.npz: computed on other episodes"):
        run_ablate(config, quiet=True)
    write_bank(tmp_path / "bank.json", "two")
    config.ablate.variants = ["visual", "alpha=0"]
    with pytest.raises(CheckpointError, match=r"the bank's texts.*--output a new folder"):
        run_ablate(config, quiet=True)
