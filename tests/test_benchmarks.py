"""The benchmark suite itself: it runs, and its ratios are the ones its numbers imply."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pairing, ratios
from benchmarks.memory import peak_mib
from benchmarks.ratios import bounds, bounds_markdown, markdown, plot, rows
from benchmarks.roofline import CASE, Ceilings, bound, measure, table

ROOT = Path(__file__).parent.parent
LONG = (  # to compute or to compile
    "1000000", "N4096", "T16", "G80", "B1280", "B80", "B25", "compile", "Flex",
)  # fmt: skip


def bench(group: str, provider: str, median: float) -> dict:
    return {"group": group, "params": {"provider": provider}, "stats": {"median": median}}


def test_ratio_table() -> None:
    record = {
        "benchmarks": [
            bench("op n=5", "dvla_fast", 2e-6),
            bench("op n=5", "slow peer", 9e-6),
            bench("op n=5", "fast peer", 6e-6),
            bench("no peer", "dvla_fast", 1e-6),
        ]
    }
    (row,) = rows(record)
    assert (row["peer"], row["ratio"]) == ("fast peer", pytest.approx(3.0))
    assert "| op n=5 | 2.0 µs | fast peer | 6.0 µs | 3.0× |  |  |" in markdown([row])


def test_ratios_of_one_round_come_first() -> None:
    record = {
        "medians": [
            {"group": "op", "provider": "dvla_fast", "median_us": 2.0},
            {"group": "op", "provider": "first", "median_us": 4.0, "ratio": 5.0},
            {"group": "op", "provider": "second", "median_us": 6.0, "ratio": 3.0},
        ]
    }
    (row,) = rows(record)
    assert (row["peer"], row["peer_us"], row["ratio"]) == ("second", 6.0, 3.0)


def test_a_bound_and_our_other_backends_are_no_peers() -> None:
    group = "beta_policy n=10000000 forward eager"
    record = {
        "benchmarks": [
            bench(group, "dvla_fast", 6e-5),
            bench(group, "dvla_fast triton", 5e-5),
            bench(group, "eager PyTorch", 12e-5),
            bench(group, "bound: writing its four outputs", 4e-5),
            bench("no peer", "dvla_fast", 1e-6),
            bench("no peer", "dvla_fast triton", 1e-6),
        ]
    }
    (row,) = rows(record)
    assert (row["peer"], row["ratio"]) == ("eager PyTorch", pytest.approx(2.0))
    (limit,) = bounds(record)
    assert (limit["bound"], limit["ratio"]) == ("writing its four outputs", pytest.approx(1.5))
    assert "| 60.0 µs | writing its four outputs | 40.0 µs | 1.5× |" in bounds_markdown([limit])


@pytest.fixture(scope="module")
def gpu_rows() -> list[str]:
    """The rows that GPUs get, as file::test, in the order in which a file measures them."""
    files = [
        f"benchmarks/test_{name}_gpu.py"
        for name in ("dual_attention", "policy", "gate", "training")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.rpartition("/")[2] for line in done.stdout.splitlines() if "::" in line]


def test_what_matters_most_on_a_gpu_comes_first(gpu_rows: list[str]) -> None:
    """Half types before float32, few images before many; of the policy, what compiles last."""
    eager = [row for row in gpu_rows if row.startswith("test_dual_attention_gpu.py::test_eager")]
    dtypes = [row.partition("torch.")[2].partition("-")[0] for row in eager]
    assert list(dict.fromkeys(dtypes)) == ["bfloat16", "float16", "float32"]
    assert dtypes == sorted(dtypes, key=["bfloat16", "float16", "float32"].index)
    for test in ("test_eager", "test_compiled"):
        gate = [row for row in gpu_rows if row.startswith(f"test_gate_gpu.py::{test}")]
        assert "torch.bfloat16-B80-d192" in gate[0]
        assert gate == sorted(gate, key=lambda row: "B1280" in row)
    policy = [
        row.partition("::")[2].partition("[")[0]
        for row in gpu_rows
        if row.startswith("test_policy_gpu.py")
    ]
    policy = list(dict.fromkeys(policy))
    first = ["test_beta_eager", "test_beta_bound", "test_gate_eager"]
    assert policy[:3] == first
    assert policy[-1] == "test_gate_compiled"


def test_few_gpu_rows_wait_for_torch_compile(gpu_rows: list[str]) -> None:
    """Each takes seconds to begin though other processes compiled it, with autotuning a minute."""
    autotuned = [row for row in gpu_rows if "max-autotune" in row]
    assert len(autotuned) <= 6
    compiled = [row for row in gpu_rows if "compiled[" in row]
    assert not [
        row for row in gpu_rows if "torch.compile" in row and row not in autotuned + compiled
    ]
    assert len(compiled) <= 53
    assert any("1600" in row for row in compiled)


@pytest.mark.parametrize("message", ["No available kernel. Aborting.", "cuDNN: no plan\nat 0x1"])
def test_a_backend_that_cannot_run_a_case_is_skipped(message: str) -> None:
    from benchmarks.test_dual_attention_gpu import first_results

    def call() -> list[torch.Tensor]:
        raise RuntimeError(message)

    for provider in ("2xSDPA+lerp cudnn", "FlexAttention"):
        with pytest.raises(pytest.skip.Exception, match=f"this: {message.splitlines()[0]}$"):
            first_results(provider, call)
    with pytest.raises(RuntimeError, match=r"No available|cuDNN"):
        first_results("dvla_fast", call)


@pytest.mark.parametrize(("ours", "calls"), [(0.0011, 5), (1e-6, 100), (3.0, 1)])
def test_a_peer_is_timed_in_turn_with_ours(
    monkeypatch: pytest.MonkeyPatch, ours: float, calls: int
) -> None:
    clock, order = [0.0], []

    def run(name: str) -> None:
        order.append(name)
        # the machine is three times as slow after a while; the peer always takes twice as long
        slow = 3 if len(order) > 30 else 1
        clock[0] += slow * ours * (1 if name == "dvla_fast" else 2)

    class Benchmark:
        def __init__(self, disabled: bool = False) -> None:
            self.disabled, self.extra_info = disabled, {}

        def pedantic(self, target: Callable, rounds=1, iterations=1, warmup_rounds=0) -> None:
            assert self.disabled or (rounds >= 2 and iterations == calls)
            target()

    monkeypatch.setattr(pairing.time, "perf_counter", lambda: clock[0])
    off, own, peer = Benchmark(disabled=True), Benchmark(), Benchmark()
    pairing.time_beside(off, "peer", run, 1.0)
    assert order == ["peer"]
    pairing.time_beside(own, "dvla_fast", run, 1.0)
    assert off.extra_info == own.extra_info == {}
    pairing.time_beside(peer, "peer", run, 1.0)
    assert peer.extra_info == {"ratio": 2.0}
    assert order[-2 * calls :] == ["dvla_fast"] * calls + ["peer"] * calls


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path: Path) -> None:
    """Each benchmark once, without timing, small cases only: an exception would show."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-disable", "-q",
            "-p", "no:cacheprovider",
            "-k", " and ".join(f"not {name}" for name in LONG),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def small_setting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Settings of 80 base images."""
    from benchmarks import training_loops

    monkeypatch.setattr(training_loops, "CLASSES", 5)
    recipe = dataclasses.replace(training_loops.RECIPE, batch_size=20)
    return functools.partial(training_loops.Setting, per_class=16, recipe=recipe)


@pytest.mark.slow
def test_training_beside_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m benchmarks.training`` small: both sides agree, every row is there."""
    pytest.importorskip("timm")
    from benchmarks import training
    from dvla_fast.engine.config import ExecutionConfig

    # bfloat16 takes minutes where the CPU has no instructions for it; test_execution.py has it.
    monkeypatch.setitem(
        training.EXECUTIONS, "dvla_fast bfloat16", ExecutionConfig(channels_last=True)
    )
    monkeypatch.setattr(training, "Setting", small_setting(monkeypatch))
    monkeypatch.setattr(training, "FEWEST", 1)
    monkeypatch.setattr(training, "EPISODES", (1,))
    training.main(
        ["--image-size", "32", "--seconds", "0", "--texts", "none", "--malloc", "returns"]
    )
    _, *stages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for stage, count in zip(stages, (4, 3)):
        rows = [row for name, row in stage.items() if name != "stage"]
        assert len(rows) == count
        assert all(row["per_second"] > 0 for row in rows)


@pytest.mark.slow
def test_training_on_a_gpu_beside_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Float32 rows of ``test_training_gpu.py``, small, on the CPU."""
    pytest.importorskip("timm")
    from benchmarks import test_training_gpu as gpu
    from benchmarks import training_loops

    encode = training_loops.text_tower("clip", torch.device("cpu"))
    assert encode is not None
    assert encode(2).square().sum(-1).tolist() == pytest.approx([1, 1], abs=1e-5)
    known = torch.nn.functional.normalize(torch.randn(30, training_loops.TEXT_DIM), dim=-1)
    towers = {"clip": lambda count: known[:count], "none": None}
    monkeypatch.setattr(training_loops, "text_tower", lambda kind, device, half: towers[kind])
    monkeypatch.setattr(gpu, "AMOUNTS", {"pretraining": (80, "images"), "meta-tuning": (1, "of")})
    monkeypatch.setattr(gpu, "BFLOAT16", gpu.FLOAT32)
    monkeypatch.setattr(gpu, "IMAGES", 80)
    setting = small_setting(monkeypatch)(tmp_path, 32)
    assert training_loops.check(setting) < 0.01
    taken = []

    class Benchmark:
        def pedantic(self, target: Callable, rounds: int, warmup_rounds: int) -> None:
            target()
            taken.append((self.group, self.name))  # type: ignore[attr-defined]

    for stage in ("pretraining", "meta-tuning"):
        gpu.time_steps(Benchmark(), setting, stage, "plain loop float32")
    gpu.time_steps(Benchmark(), setting, "pretraining", "dvla_fast float32")
    gpu.time_steps(Benchmark(), setting, "meta-tuning", "dvla_fast")
    assert len(taken) == 4
    assert len({group for group, _ in taken}) == 2


def test_a_kept_record_is_not_kept_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text('{"medians": []}')
    monkeypatch.setattr("sys.argv", ["ratios", str(kept), "--save", str(tmp_path / "again.json")])
    with pytest.raises(SystemExit):
        ratios.main()
    assert f"--save: {kept} holds nothing but the medians already" in capsys.readouterr().err


def test_roofline() -> None:
    """Bounds worked out by hand: arithmetic for a long case, memory for one score a value."""
    ceilings = Ceilings({"float32": 1e9, "bfloat16": 2e9}, exps=1e9, bandwidth=1e9)
    long = CASE.match("dual_attention T1-G1-H1-D64-N100-P100 float32 forward")
    assert long is not None
    scores = 100 * 200
    assert bound(long, ceilings) == pytest.approx((4 * 64 * scores + scores) / 1e9)
    thin = CASE.match("dual_attention T1-G1-H1-D8-N100-P1 bfloat16 forward")
    assert thin is not None
    slow = ceilings._replace(bandwidth=1e6)
    assert bound(thin, slow) == pytest.approx(2 * (3 * 8 + 2 * 800 + 8) / 1e6)
    record = {"medians": [{"group": long[0], "provider": "dvla_fast", "median_us": 1e4}]}
    assert "| 5,140.0 µs | 51% |" in table(record, ceilings)
    measured = measure(32)
    assert min(*measured.flops.values(), measured.exps, measured.bandwidth) > 0


def test_picture(tmp_path: Path) -> None:
    row = {"group": "op", "ours_us": 1.0, "peer": "p", "peer_us": 2.0, "ratio": 2.0}
    plot([{**row, "ours_mib": None, "peer_mib": 1.0}], tmp_path / "ratios.png", "title")
    assert (tmp_path / "ratios.png").stat().st_size > 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_peak_memory() -> None:
    peak = peak_mib(lambda: torch.ones(16 * 2**20 // 4))
    assert peak is None or 15 < peak < 20
