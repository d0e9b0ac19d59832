"""Ablations: cells that are kept, shared folders, failures, tables, bad input."""

from __future__ import annotations

import csv
import functools
import io
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla_fast.engine import ablation_cells
from dvla_fast.engine.ablate import _worker, run_ablate, summarise
from dvla_fast.engine.ablation_cells import Cell, Store, Workshop, start_alike
from dvla_fast.engine.ablation_claims import hallucinated_shares
from dvla_fast.engine.ablation_variants import all_variants, chosen_variants
from dvla_fast.engine.config import AblateConfig, AblateRun, AugmentConfig, DemoRun, SemanticsConfig
from dvla_fast.engine.models import build_model
from dvla_fast.engine.run_folder import RunFolder, read_config, read_metrics
from dvla_fast.engine.settings import UsageError, to_dict
from dvla_fast.engine.texts import build_texts
from dvla_fast.errors import OutputError
from dvla_fast.pictures.ablation import _places
from dvla_fast.semantics.transformers_encoder import TransformersEncoder


@pytest.fixture
def config(tiny: DemoRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AblateRun:
    few = functools.partial(ablation_cells.reward_curves, episodes=8)
    monkeypatch.setattr(ablation_cells, "reward_curves", few)
    tiny.metatune.backbone_lr = 0.0
    tiny.metatune.epochs = tiny.pretrain.epochs = 1
    tiny.pretrain.warmup_epochs = 0
    return AblateRun(
        output=str(tmp_path / "run"),
        device="cpu",
        model=tiny.model,
        semantics=SemanticsConfig(top_k=3),
        pretrain=tiny.pretrain,
        metatune=tiny.metatune,
        evaluate=tiny.evaluate,
        ablate=AblateConfig(seeds=2, processes=1, variants=["visual", "alpha=0.5"], draws=200),
    )


def rows(summary: dict[str, Any]) -> dict[str, Any]:
    return {row["variant"]: row for row in summary["rows"]}


def test_whole_ablation(config: AblateRun, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_ablate(config)
    assert "full-seed1" in capsys.readouterr().err
    found = rows(summary)
    assert list(found) == ["full", "visual", "alpha=0.5"]
    assert summary["cells"] | {"seconds": 0, "core_seconds": 0} == {
        "all": 8, "finished": 8, "core_seconds": 0, "seconds": 0,
    }  # fmt: skip
    store = Store(Path(config.output))
    for shot in (0, 1):
        fixed = found["alpha=0.5"]["results"][shot]
        assert fixed["alpha"] == [0.5, 0.5]
        full = found["full"]["results"][shot]
        apart = np.mean(fixed["by_seed"]) - np.mean(full["by_seed"])
        assert fixed["difference"]["estimate"] == pytest.approx(apart, abs=1e-6)
        assert fixed["difference"]["p_holm"] >= fixed["difference"]["p_value"]
        assert full["difference"] is None
        assert "p_value" not in full["accuracy"]
    hashes = [
        store.read(Cell(row, seed))[1]["episodes_sha256"]
        for row in chosen_variants(config, 1)
        for seed in (0, 1)
    ]
    assert all(one == hashes[0] for one in hashes)
    curves = [
        store.read(Cell(chosen_variants(config, 1)[0], seed))[0]["rewards"] for seed in (0, 1)
    ]
    for layer, item in enumerate(summary["pull"]):
        assert item["rewards"] == pytest.approx(np.mean(curves, 0)[layer].tolist())
        by_seed = found["full"]["results"][0]["alpha_by_seed"]
        assert item["learned"] == [alphas[layer] for alphas in by_seed]
        assert len(item["best"]) == 2
        for best, held in zip(item["best"], item["best_with_entropy"], strict=True):
            assert abs(held - 0.5) <= abs(best - 0.5) + 0.011  # the bonus pulls to 1/2
    page = (store.path / "ablation.md").read_text()
    assert "| `visual` |" in page
    assert page.count("| stage ") == 2
    assert "Holm" in page
    table = list(csv.DictReader(io.StringIO((store.path / "ablation.csv").read_text())))
    assert len(table) == 6
    assert float(table[0]["accuracy"]) == pytest.approx(
        found["full"]["results"][0]["accuracy"]["estimate"]
    )
    assert (store.path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((store.path / "ablation.json").read_text())["rows"] == json.loads(
        json.dumps(summary["rows"])
    )
    assert not list((store.path / "running").iterdir())


def test_finished_cells_are_kept_and_others_begun_anew(config: AblateRun) -> None:
    first = run_ablate(config, quiet=True)
    store = Store(Path(config.output))
    variants = {row.name: row for row in chosen_variants(config, 1)}
    lost, kept = (store.result(Cell(variants["full"], seed)) for seed in (0, 1))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    half = store.path / "running" / "full-seed0"  # cut off in the middle
    half.mkdir()
    (half / "config.yaml").write_text("half")
    second = run_ablate(config, quiet=True)
    assert kept.stat().st_mtime_ns == before
    assert second["rows"] == first["rows"]  # the same numbers again
    config.ablate.seeds, config.ablate.groups = 3, ["scope"]  # more of both
    third = run_ablate(config, quiet=True)
    assert kept.stat().st_mtime_ns == before
    assert rows(third)["scope=class"]["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_backbone_cut_off_goes_on_with_other_cells(
    config: AblateRun, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """``recorded``: as before this was allowed, the backbone's record names the cells."""
    config.pretrain.epochs = 2
    config.ablate.variants = ["visual"]
    whole = RunFolder.log

    def interrupted(self: RunFolder, stage: str, step: int, **values: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt
        whole(self, stage, step, **values)

    monkeypatch.setattr(RunFolder, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_ablate(config, quiet=True)
    monkeypatch.undo()
    path = Path(config.output, "backbones", "seed0", "config.yaml")
    assert "ablate" not in read_config(path.parent)
    if recorded:
        with path.open("a") as stream:
            stream.write("ablate: {seeds: 2}\ndevice: cuda\n")
    config.ablate.seeds = 1
    summary = run_ablate(config, quiet=True)
    assert (summary["failures"], summary["cells"]["finished"]) == ({}, 3)
    steps = [row["step"] for row in read_metrics(path.parent, "pretrain")]
    assert steps == [1, 2]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    store.prepare()
    (tmp_path / "run/claims/config").mkdir()  # no file can be opened there, whoever asks
    with (
        pytest.raises(OutputError, match=r"claims/config: cannot write .* may write to"),
        store.claim("config"),
    ):
        pass


def test_other_settings_are_refused(config: AblateRun) -> None:
    config.ablate.variants = ["visual"]
    config.ablate.seeds = 1
    run_ablate(config, quiet=True)
    record = Path(config.output) / "config.yaml"
    whole = record.read_text()
    record.write_text(whole.replace("  discount: 0.0\n", ""))
    with pytest.raises(OutputError, match=r"another version .* did not record metatune\.discount:"):
        run_ablate(config, quiet=True)
    record.write_text(whole)
    config.metatune.lr = 0.1
    with pytest.raises(OutputError, match=r"other settings.*metatune\.lr"):
        run_ablate(config, quiet=True)
    occupied = Path(config.output).parent / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    config.output = str(occupied)
    with pytest.raises(OutputError, match="no ablation"):
        run_ablate(config, quiet=True)
    assert [item.name for item in occupied.iterdir()] == ["notes.txt"]


def fail_in(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on one cell fails."""
    whole = Workshop._variant

    def broken(self: Workshop, cell: Cell, variant: Any) -> None:
        if cell.key == key:
            raise RuntimeError("no luck")
        whole(self, cell, variant)

    monkeypatch.setattr(Workshop, "_variant", broken)


def test_failed_cell_is_reported_and_the_rest_finished(
    config: AblateRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in("alpha=0.5-seed1", monkeypatch)
    summary = run_ablate(config, quiet=True)
    assert summary["failures"] == {"alpha=0.5-seed1": "RuntimeError: no luck"}
    assert summary["cells"]["finished"] == 7
    assert rows(summary)["alpha=0.5"]["seeds"] == [0]
    page = Path(config.output, "ablation.md").read_text()
    assert "Failed cells: alpha=0.5-seed1" in page
    assert "(1 of 2 seeds)" in page
    monkeypatch.undo()
    assert run_ablate(config, quiet=True)["failures"] == {}  # tried again


def test_an_error_that_another_launch_takes_away_stops_nothing(
    config: AblateRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be gone between two looks at it."""
    real = Store.failed

    def failed(store: Store, cell: Cell) -> bool:
        found = real(store, cell)
        store.error(cell).unlink(missing_ok=True)
        return found

    config.ablate.seeds = 1
    config.ablate.variants = ["visual"]
    config.ablate.reference = "visual"
    store, cell = Store(Path(config.output)), Cell(None, 0)
    store.prepare()
    store.error(cell).write_text('{"error": "RuntimeError: on purpose"}')
    monkeypatch.setattr(Store, "failed", failed)
    summary = summarise(config, store, chosen_variants(config, 1), [0])
    assert summary["failures"] == {"backbone-seed0": "another launch is trying it again"}


def test_a_reference_that_lacks_a_seed(config: AblateRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences are then of fewer seeds than the accuracy beside them: table and plot say so."""
    fail_in("full-seed1", monkeypatch)
    config.ablate.variants = ["visual"]
    summary = run_ablate(config, quiet=True)
    page = Path(config.output, "ablation.md").read_text()
    assert "(1 of 2 seeds)" in next(x for x in page.splitlines() if x.startswith("| `full`"))
    row = next(x for x in page.splitlines() if x.startswith("| `visual`"))
    assert "(Δ: 1 of 2 seeds) (Δ of one seed: its interval is over episodes alone)" in row
    assert "points (1 of 2 seeds)" in page
    table = list(csv.DictReader(io.StringIO(Path(config.output, "ablation.csv").read_text())))
    assert [(x["seeds"], x["difference_seeds"]) for x in table[2:]] == [("2", "1")] * 2
    assert list(_places(summary)[2].values()) == ["visual (1 of 2 seeds)"]


def test_a_killed_launch_ends_its_workers(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import multiprocessing, os, signal, threading
from dvla_fast.engine.ablate import _end_with_parent

def worker(ready):
    _end_with_parent()
    ready.send(None)
    threading.Event().wait(30)  # ended before, or else says so
    print("left alone", flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=worker, args=(there,), daemon=True).start()
    here.recv()
    print("working", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    # the output ends with the last process that could write to it
    ran = subprocess.run([sys.executable, program], stdout=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (-signal.SIGKILL, "working\n")


def test_what_a_kill_at_the_start_leaves(config: AblateRun) -> None:
    config.ablate = AblateConfig(seeds=1, processes=1, variants=["visual"], draws=200)
    config.ablate.reference = "visual"
    folder = Path(config.output)
    (folder / "claims").mkdir(parents=True)
    for name in (".inputs.json.x1.tmp", ".config.yaml.x2.tmp"):
        (folder / name).write_text("half")
    assert run_ablate(config, quiet=True)["failures"] == {}
    for name in ("backbones/seed0/summary.json", "inputs.json"):
        kept = (folder / name).read_text()
        (folder / name).write_text("{")
        with pytest.raises(OutputError, match=r"json: damaged .*; remove it and run"):
            run_ablate(config, quiet=True)
        (folder / name).write_text(kept)


def test_failed_backbone_leaves_its_cells(
    config: AblateRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Workshop, seed: int) -> None:
        raise RuntimeError("no backbone")

    monkeypatch.setattr(Workshop, "_pretrain", broken)
    summary = run_ablate(config, quiet=True)
    assert set(summary["failures"]) == {"backbone-seed0", "backbone-seed1"}
    assert summary["cells"]["finished"] == 0
    assert "not computed" in Path(config.output, "ablation.md").read_text()


def test_damaged_cell_is_named(config: AblateRun) -> None:
    store, cell = Store(Path(config.output)), Cell(chosen_variants(config, 1)[0], 0)
    store.prepare()
    store.write(cell, {"accuracy-1": np.random.default_rng(0).random(500)}, {"seconds": 1.0})
    path = store.result(cell)
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    for damaged in (b"", b"torn", half, half + bytes(len(whole) - len(half))):
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match=r"full-seed0\.npz: not a finished cell"):
            store.read(cell)


def test_claimed_cells_are_left_to_others(config: AblateRun) -> None:
    store = Store(Path(config.output))
    store.prepare()
    with store.claim("full-seed0") as mine:
        assert mine
        with store.claim("full-seed0") as again:
            assert not again
        with store.claim("full-seed1") as other:
            assert other
    with store.claim("full-seed0") as mine:
        assert mine


def test_worker_processes_give_the_same_numbers(config: AblateRun) -> None:
    config.ablate.variants, config.ablate.seeds = ["visual"], 1
    alone = run_ablate(config, quiet=True)
    config.output += "-2"
    config.ablate.processes = 2
    shared = run_ablate(config, quiet=True)
    assert shared["cells"]["finished"] == 3
    assert shared["rows"] == alone["rows"]


def test_single_seed_says_so(config: AblateRun) -> None:
    config.ablate.seeds = 1
    summary = run_ablate(config, quiet=True)
    assert "single seed" in Path(config.output, "ablation.md").read_text()
    assert summary["note"].startswith("single seed")


def test_kept_maps_change_nothing_but_the_time(
    config: AblateRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.ablate.variants, config.ablate.seeds = ["grpo", "layers=3.0", "scope=class"], 1
    fast = run_ablate(config, quiet=True)
    monkeypatch.setattr(ablation_cells, "has_constant_prefix", lambda config: False)
    config.output += "-slow"
    slow = run_ablate(config, quiet=True)
    for one, other in zip(fast["rows"], slow["rows"]):
        for a, b in zip(one["results"], other["results"]):
            assert a["accuracy"]["estimate"] == pytest.approx(b["accuracy"]["estimate"], abs=0.02)
            assert a["alpha"] == pytest.approx(b["alpha"], abs=1e-4)


def test_maps_are_not_kept_where_images_change(config: AblateRun) -> None:
    from dvla_fast.engine.prefixes import check_constant_prefix, has_constant_prefix

    assert has_constant_prefix(config.metatune)
    config.metatune.augment = AugmentConfig(flip=True)
    with pytest.raises(UsageError, match="augmentation"):
        check_constant_prefix(config.metatune)
    config.metatune.augment, config.metatune.backbone_lr = AugmentConfig(), 1e-6
    assert not has_constant_prefix(config.metatune)


def test_settings_that_do_not_fit_fail_before_work(config: AblateRun) -> None:
    config.ablate.layers = [[[9, 9]]]
    config.ablate.variants = ["layers=9.9"]
    with pytest.raises(UsageError, match=r"variant layers=9\.9"):
        run_ablate(config, quiet=True)
    config.pretrain.batch_size = 1
    with pytest.raises(UsageError, match="leaves BatchNorm nothing to compare"):
        run_ablate(config, quiet=True)
    config.evaluate.construct = "build.yaml"
    with pytest.raises(UsageError, match="'dvla-fast evaluate' alone"):
        run_ablate(config, quiet=True)
    assert not Path(config.output).exists()


def test_the_command_is_quoted_for_the_shell(
    config: AblateRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["ablate", "my settings.yaml", "--ablate.variants", "[visual,alpha=0.5]"]
    monkeypatch.setattr("sys.argv", ["dvla-fast", *given])
    store = Store(Path(config.output))
    line = summarise(config, store, [], [])["line"]
    assert shlex.split(line) == ["dvla-fast", *given]


def test_variants_start_alike(config: AblateRun) -> None:
    workshop = Workshop(config, Store(Path(config.output)), torch.device("cpu"))
    variants = {row.name: row for row in all_variants(config, 1)}
    models = {}
    for name in ("full", "alpha=0.5", "categorical", "layers=3.0"):
        torch.manual_seed(3)
        models[name] = build_model(workshop._spec(variants[name].apply(config)))
    weight = "gates.1.text_projection.weight"
    start = {name: model.state_dict() for name, model in models.items()}
    assert not torch.equal(start["full"][weight], start["alpha=0.5"][weight])
    for name in ("alpha=0.5", "categorical", "layers=3.0"):
        start_alike(models[name], models["full"])
        shared = [key for key in start[name] if key in start["full"]]
        same = [
            key for key in shared if torch.equal(start["full"][key], models[name].state_dict()[key])
        ]
        shapes = [start[name][key].shape == start["full"][key].shape for key in shared]
        assert len(same) == sum(shapes)


@pytest.mark.parametrize(("bank", "false"), [("shapes", 3 / 9), ("shapes-varied", 3 / 7)])
def test_selection_on_shapes_cannot_see_hallucinations(
    config: AblateRun, bank: str, false: float
) -> None:
    config.semantics = SemanticsConfig(bank=bank, top_k=5, dim=256)
    shares = hallucinated_shares(config)
    assert shares["proposed"] == pytest.approx(false)
    assert set(shares["chosen"]) == {"1", "2", "3", "4", "5", "6", "8"}
    assert all(0 <= share <= 1 for share in shares["chosen"].values())


def test_command_line(
    config: AblateRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvla_fast.cli import main
    from dvla_fast.engine.settings import to_yaml

    config.output = ""
    config.ablate.seeds = 1
    settings = tmp_path / "mine.yaml"
    settings.write_text(to_yaml(to_dict(config)))
    out = tmp_path / "out"
    assert main(["ablate", str(settings), "--output", str(out)]) == 0
    assert "| `visual` |" in capsys.readouterr().out
    assert (
        main(["ablate", str(settings), "--output", str(out), "--ablate.groups", "[nothing]"]) == 2
    )
    assert "unknown" in capsys.readouterr().err
    assert torch.get_num_threads() == 1


def test_interrupted_worker_is_silent(config: AblateRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dvla_fast.engine.ablate.work", stop)
    with pytest.raises(SystemExit) as ended:
        _worker(to_dict(config), [("visual", 0)])
    assert ended.value.code == 130


def test_variants_share_one_encoder(
    config: AblateRun, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    vectors = TransformersEncoder._vectors

    def watched(encoder: TransformersEncoder, texts: list[str]) -> torch.Tensor:
        encoded.extend(texts)
        return vectors(encoder, texts)

    monkeypatch.setattr(TransformersEncoder, "_vectors", watched)
    config.semantics = SemanticsConfig(
        encoder=f"transformers:{tiny_clip}", top_k=2, truncate=True
    )  # fmt: skip
    config.ablate = AblateConfig(groups=["semantics"])
    workshop = Workshop(config, Store(Path(config.output)), torch.device("cpu"))
    variants = chosen_variants(config, 1)
    with pytest.warns(UserWarning, match="longer than"):
        workshop.check(variants)
    assert len(variants) > 4
    assert len(encoded) == len(set(encoded))
    cut = {row.name: workshop.texts(row.apply(config))[1]["truncated_texts"] for row in variants}
    alone = build_texts(config.semantics, workshop.data, torch.device("cpu"))[1]
    assert cut["full"] == alone["truncated_texts"] > 0
