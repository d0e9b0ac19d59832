"""The offline tuner without a GPU: candidates, choice, the file it writes; the timer is made up."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.test_dual_attention import Shape

launch = importlib.import_module("dvla_fast.kernels.dual_attention.launch")

EPISODE, LONG = Shape(1, 80, 8, 24, 196, 45), Shape(2, 1, 8, 64, 4096, 1024)
DEVICE = launch.Device("sm_90", shared=232_448)
FACTS = {"gpu": "Test GPU", "torch": "2", "triton": "3", "date": "2000-01-01"}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the table that the launcher reads."""
    path = tmp_path / "table.json"
    shutil.copy(launch.TABLE, path)
    monkeypatch.setattr(launch, "TABLE", path)
    yield path
    launch.forget()


def most_warps_fastest(kernel: str, shape: Shape, dtype: torch.dtype, tile: Any) -> Any:
    """64 x 32 tiles alone run; the more warps the faster."""
    if (tile.rows, tile.keys) != (64, 32):
        return None
    return 1e-6 * tile.stages / tile.warps, 1000 * tile.warps


def test_candidates_cover_the_default_tile() -> None:
    for dtype in (torch.float16, torch.float32):
        target = tune.class_of("forward", EPISODE, dtype, DEVICE)
        tiles = list(tune.candidates(target))
        assert len(set(tiles)) == len(tiles) > 5
        default = launch.find_tile("forward", dtype.itemsize, "ieee", 32, 45, 196, launch.Device())
        assert default in tiles
        assert all(tile.rows <= 64 for tile in tiles)


def test_backward_candidates_hold_all_rows() -> None:
    target = tune.class_of("backward", EPISODE, torch.float16, DEVICE)
    assert {tile.rows for tile in tune.candidates(target)} == {64}


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        (EPISODE, ["forward", "backward"]),
        (LONG, ["forward", "backward_rows", "backward_keys"]),
    ],
)
def test_kernels_that_a_shape_runs(shape: Shape, kernels: list[str]) -> None:
    found = [name for name in launch.KERNELS if tune.class_of(name, shape, torch.bfloat16, DEVICE)]
    assert found == kernels


def test_fastest_candidate_wins_and_serves(table: Path) -> None:
    lines: list[str] = []
    rows = list(tune.tune([EPISODE], [torch.bfloat16], DEVICE, most_warps_fastest, lines.append))
    assert lines
    assert [row["kernel"] for row in rows] == ["forward", "backward"]
    assert all((row["warps"], row["stages"], row["shared"]) == (8, 1, 8000) for row in rows)

    launch.write_section(table, "sm_90", FACTS, rows)
    assert launch.find_tile("forward", 2, "ieee", 32, 45, 196, DEVICE) == launch.Tile(64, 32, 8, 1)
    default = launch.find_tile("forward", 2, "ieee", 32, 9, 196, launch.Device())
    assert launch.find_tile("forward", 2, "ieee", 32, 9, 196, DEVICE) == default


def test_a_candidate_must_run_every_shape_of_its_class() -> None:
    larger = Shape(1, 80, 8, 24, 250, 45)

    def measure(kernel: str, shape: Shape, dtype: torch.dtype, tile: Any) -> Any:
        if shape == larger and tile.warps == 8:
            return None  # as a tile with wrong numbers or too much shared memory
        return most_warps_fastest(kernel, shape, dtype, tile)

    rows = tune.tune([EPISODE, larger], [torch.float16], DEVICE, measure, lambda line: None)
    assert {row["warps"] for row in rows} == {4}


def test_tiles_that_launch_alike_are_measured_once() -> None:
    short = Shape(25, 1, 8, 48, 49, 9)
    measured: list[Any] = []

    def measure(*what: Any) -> Any:
        measured.append(what)
        return 1e-6, 1000

    list(tune.tune([short], [torch.bfloat16], DEVICE, measure, lambda line: None))
    assert len(measured) == len(set(measured))
    assert {tile.keys for *_, tile in measured} == {16, 32, 64}  # 128 keys would launch 64


def test_each_class_is_there_as_soon_as_it_is_known() -> None:
    asked: list[str] = []

    def measure(kernel: str, *rest: Any) -> Any:
        asked.append(kernel)
        return most_warps_fastest(kernel, *rest)

    found = tune.tune([EPISODE], [torch.bfloat16], DEVICE, measure, lambda line: None)
    assert next(found)["kernel"] == "forward"
    assert set(asked) == {"forward"}


def test_a_class_that_is_cut_off_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])

    def measure(kernel: str, *rest: Any) -> Any:
        clock[0] += 2.0 if kernel == "backward" else 0.0
        return most_warps_fastest(kernel, *rest)

    lines: list[str] = []
    rows = list(tune.tune([EPISODE], [torch.bfloat16], DEVICE, measure, lines.append, 1.0))
    assert [row["kernel"] for row in rows] == ["forward"]
    assert lines[-1] == "no time left: 1 classes left as they were"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "device_of", lambda device: DEVICE)
    monkeypatch.setattr(tune, "facts", lambda: FACTS)


def test_the_table_is_written_after_each_class(
    table: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(kernel: str, *rest: Any, precision: str) -> Any:
        if kernel == "backward":
            raise KeyboardInterrupt
        return most_warps_fastest(kernel, *rest)

    monkeypatch.setattr(tune, "measure_on_gpu", measure)
    shape = "1,80,8,24,196,45"
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--output", str(table), "--shapes", shape, "--dtypes", "float16"])
    (row,) = json.loads(table.read_text())["sm_90"]["rows"]
    assert row["kernel"] == "forward"


def test_a_precision_is_tuned_apart(
    table: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows serve it alone; where it does not run, nothing is measured."""
    asked = []

    def measure(*what: Any, precision: str) -> Any:
        asked.append(precision)
        return most_warps_fastest(*what)

    monkeypatch.setattr(tune, "measure_on_gpu", measure)
    shapes = ["--shapes", "1,80,8,24,196,45", "1,80,8,160,196,45"]
    tune.main(["--output", str(table), *shapes, "--dtypes", "float32", "--precision", "tf32x3"])
    assert set(asked) == {"tf32x3"}
    rows = json.loads(table.read_text())["sm_90"]["rows"]
    assert {(row["precision"], row["head_dim"]) for row in rows} == {("tf32x3", 32)}
    before = launch.find_tile("forward", 4, "ieee", 32, 45, 196, launch.Device())
    assert launch.find_tile("forward", 4, "tf32x3", 32, 45, 196, DEVICE) == launch.Tile(
        64, 32, 8, 1
    )
    assert launch.find_tile("forward", 4, "ieee", 32, 45, 196, DEVICE) == before


def test_half_types_are_tuned_for_every_precision() -> None:
    for precision in launch.PRECISIONS:
        target = tune.class_of("forward", EPISODE, torch.float16, DEVICE, precision)
        assert target is not None
        assert target.precision is None


def test_shared_bytes_are_the_most_of_all_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [SimpleNamespace(metadata=SimpleNamespace(shared=size)) for size in (5, 9, 7)]
    monkeypatch.setattr(tune, "compiled_variants", lambda kernel: dict(enumerate(sizes)))
    assert tune.shared_bytes("forward") == 9


def test_class_without_a_working_candidate_is_left_alone() -> None:
    lines: list[str] = []
    assert not list(tune.tune([EPISODE], [torch.float16], DEVICE, lambda *_: None, lines.append))
    assert "no candidate runs" in lines[-1]


def test_writing_replaces_a_class_and_keeps_the_rest(table: Path) -> None:
    before = json.loads(table.read_text())
    rows = list(
        tune.tune([EPISODE, LONG], [torch.float16], DEVICE, most_warps_fastest, lambda line: None)
    )
    launch.write_section(table, "sm_90", FACTS, rows)
    again = [{**rows[0], "warps": 2}]
    launch.write_section(table, "sm_90", {**FACTS, "date": "2000-01-02"}, again)
    written = json.loads(table.read_text())
    assert written["default"] == before["default"]
    section = written["sm_90"]
    assert section["gpu"] == "Test GPU"
    assert section["date"] == "2000-01-02"
    assert len(section["rows"]) == len(rows)
    assert again[0] in section["rows"]
    assert not list(table.parent.glob("*.tmp"))


def test_rewriting_the_table_changes_no_byte(table: Path) -> None:
    before = table.read_text()
    default = json.loads(before)["default"]
    launch.write_section(table, "sm_90", FACTS, [])
    launch.write_section(table, "default", {k: v for k, v in default.items() if k != "rows"}, [])
    written = json.loads(table.read_text())
    assert written.pop("sm_90")["rows"] == []
    assert json.dumps(written) == json.dumps(json.loads(before))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["1,2,3", "0,1,1,1,1,1"])
def test_malformed_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--shapes", text])
    assert "six positive numbers" in capsys.readouterr().err


@pytest.mark.gpu
def test_measures_on_a_gpu() -> None:
    tile = launch.Tile(64, 64, 4, 2)
    for kernel in ("forward", "backward"):
        seconds, shared = tune.measure_on_gpu(kernel, EPISODE, torch.float16, tile)
        assert seconds > 0
        assert shared > 0
