"""The tables of README.md and docs/ are those of the kept records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parent.parent
SHAPE = "T5-G1-H8-D24-N196-P9"
SUMMARIES = ("cpu", "cpu-floors", "gpu", "gpu-floors", "gpu-rows")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of records of one's own."""
    tables.record.cache_clear()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    yield tmp_path
    tables.record.cache_clear()


def row(group: str, provider: str, median: float, ratio: float | None = None) -> dict:
    more = {} if ratio is None else {"ratio": ratio}
    return {"group": group, "provider": provider, "median_us": median, **more}


def keep(path: Path, *medians: dict, **facts: str) -> None:
    path.write_text(json.dumps({**facts, "medians": medians}))


def gpu(path: Path, *medians: dict) -> None:
    keep(path, *medians, gpu="NVIDIA H200", date="2027-01-01", driver="1.2", torch="2.11",
         triton="3.6", commit="abcdef0123")  # fmt: skip


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python -m benchmarks.tables"


def test_every_record_has_its_table() -> None:
    marks = [found[2] for page in tables.PAGES for found in tables.TABLE.finditer(page.read_text())]
    kept = {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert sorted(marks) == sorted({*SUMMARIES, *kept} - set(tables.gpu_records()))


def test_a_summary_by_hand(results: Path) -> None:
    """Means over shapes and the lowest, large numbers without decimals, holes, eager peers."""
    line = tables.Line("both", ("op {mode} n=1", "op {mode} n=2"))
    single = tables.Line("one", ("only {mode}",))
    lacking = tables.Line("none", ("else {mode}",))
    medians = [
        row(f"op {mode} n={n}", provider, 1.0, ratio)
        for mode, factor in (("forward", 1), ("forward+backward", 10))
        for n in (1, 2)
        for provider, ratio in (("dvla_fast", None), ("peer", 2.0 * n * n * factor))
    ]
    keep(results / "one-machine.json", *medians)
    keep(
        results / "one-machine-more.json",
        *(row(f"only {mode}", name, 3.0) for mode in tables.MODES
          for name in ("dvla_fast", "eager PyTorch")),
    )  # fmt: skip
    keep(results / "two.json", row("only forward", "dvla_fast", 1.0))
    columns = {"A": ["one-machine", "one-machine-more"], "B": ["two"]}
    made = tables.summary([line, single, lacking], columns)
    assert made.splitlines()[2:] == [
        "| both | 4.0× (2.0×), 40× (20×) |  |",
        "| one | 1.0×, 1.0× ¹ |  |",
    ]


def test_floors_by_hand(results: Path) -> None:
    """The lowest or the mean, among some peers or all, bold where it is less than was asked."""
    groups = ("op {mode} n=1", "op {mode} n=2")
    asked = [
        tables.Floor("lowest", groups, (2, 30)),
        tables.Floor("mean", groups, (4, None), mean=True),
        tables.Floor("compiled", groups[:1], (None, 44), "torch.compile"),
        tables.Floor("nowhere", ("else {mode}",), (1, 1)),
    ]
    medians = [
        row(f"op {mode} n={n}", provider, 1.0, ratio)
        for mode, factor in (("forward", 1), ("forward+backward", 10))
        for n in (1, 2)
        for provider, ratio in (
            ("dvla_fast", None),
            ("eager", 1.98 * n * n * factor),
            ("torch.compile", 4.4 * n * factor),
        )
    ]
    keep(results / "one.json", *medians)
    keep(results / "half.json", *medians[:3])
    assert tables.floors(asked, {"A": ["one"], "B": ["half"]}).splitlines() == [
        "| forward, forward + backward | asked | A | B |",
        "|---|---|---|---|",
        "| lowest | 2×, 30× | **1.98×**, **20×** |  |",
        "| mean | 4× | **3.96×** |  |",
        "| compiled | 44× | 44× |  |",
        "| nowhere | 1×, 1× |  |  |",
    ]


def test_every_floor_of_cpus_was_measured_somewhere() -> None:
    made = tables.floors(tables.CPU_FLOORS, tables.cpu_records()).splitlines()[2:]
    assert [line for line in made if "×" not in line.split("|", 3)[3]] == []


def test_a_first_record_of_a_gpu(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = results / "page.md"
    page.write_text("# Page\n\n<!-- table: gpu -->\n<!-- end -->\n\nEnd.\n")
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(tables, "ROOT", results)
    tables.main()
    assert capsys.readouterr().out == "page.md: written\n"
    assert "No GPU record exists yet: `make gpu-check`" in page.read_text()
    gpu(
        results / "nvidia-h200.json",
        row("beta_policy n=100 forward eager", "dvla_fast", 10.0),
        row("beta_policy n=100 forward eager", "eager PyTorch", 123.0),
        row("beta_policy n=100 forward+backward eager", "dvla_fast", 10.0),
        row("beta_policy n=100 forward+backward eager", "eager PyTorch", 50.0),
        row("beta_policy n=100 forward eager", "bound: writing its four outputs", 1.0),
        row("pretraining visformer_tiny 224 px 2048 images", "dvla_fast", 0.36e6),
        row("meta-tuning visformer_tiny 224 px 16 episodes", "dvla_fast", 0.6e6),
    )
    tables.main()
    text = page.read_text()
    assert "No GPU" not in text
    assert "| `beta_policy`, 100 states | 12×, 5.0× ¹ |" in text
    assert "NVIDIA H200: 2027-01-01, driver 1.2, torch 2.11, Triton 3.6, commit abcdef0." in text
    # 61,440,000 images at 2,048 in 0.36 s, and 48,000 episodes at 16 in 0.6 s
    assert "take 3.0 + 0.5 hours, without validation, colour" in text
    assert text.endswith("End.\n")
    tables.main()
    assert page.read_text() == text
    gpu(
        results / "nvidia-h200-more.json",
        *(row(f"beta_policy n=1600 {mode} eager", name, time) for mode in tables.MODES
          for name, time in (("dvla_fast", 1.0), ("eager PyTorch", 7.0))),
    )  # fmt: skip
    tables.main()
    text = page.read_text()  # two records of one GPU are one column
    assert "| `beta_policy`, 100 states | 12×, 5.0× ¹ |" in text
    assert "| `beta_policy`, 1,600 states | 7.0×, 7.0× ¹ |" in text


def test_gpu_lines_name_groups_that_are_measured() -> None:
    """A group that no benchmark has would leave its line out for ever, without a word."""
    from benchmarks import test_dual_attention_gpu as attention
    from benchmarks import test_gate_gpu as gate
    from benchmarks import test_policy_gpu as policy
    from benchmarks import test_training_gpu as training

    eager, graph = "eager", "graph"
    measured = {
        *(f"dual_attention {s} {str(d)[6:]} {m} eager" for d, s in attention.CASES
          for m in attention.MODES),
        *(f"dual_attention {s} bfloat16 {m} eager" for s in attention.LONG
          for m in attention.MODES),
        *(f"dual_attention {s} bfloat16 {m} graph" for s in attention.GRAPHS
          for m in attention.MODES),
        *(f"beta_policy n={n} {m} {how}" for n in policy.SIZES for m in policy.MODES
          for how in (eager, graph)),
        *(f"gate_policy {c} float32 {m} {eager}" for c in policy.gate.CASES for m in policy.MODES),
        *(f"RLAGate {c} {str(d)[6:]} {m} {eager}" for d, c in gate.EAGER_CASES for m in gate.MODES),
        *(f"RLAGate {c} bfloat16 {m} {graph}" for c in gate.FEW for m in gate.MODES),
        *(f"{stage} visformer_tiny {training.SIZE} px {amount} {what}"
          for stage, (amount, what) in training.AMOUNTS.items()),
    }  # fmt: skip
    for line in tables.GPU_LINES:
        for group in line.groups:
            for mode in line.modes:
                assert group.format(mode=mode) in measured, line.label
    for floor in tables.GPU_FLOORS:
        for group in floor.groups:
            for mode, least in zip(tables.MODES, floor.asked):
                assert least is None or group.format(mode=mode) in measured, floor.figure
