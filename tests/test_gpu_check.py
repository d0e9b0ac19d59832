"""The GPU check without a GPU: what it runs and says, what it keeps, the record it makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.ratios import markdown, rows

ROOT = Path(__file__).parent.parent
GROUP = "dual_attention T1-G80-H8-D24-N196-P45 bfloat16 forward eager"
ROW = {"group": GROUP, "provider": "dvla_fast", "median_us": 20.0, "peak_mib": 1.5}
BUILT = {"problem": None, "cuda_architectures": ["90"]}
# What a machine with a GPU may lack; tests of other things must not keep those marked gpu away.
OPTIONAL = [
    "accelerate", "jsonargparse", "jsonschema", "kornia", "open_clip", "openai", "resvg_py",
    "tensorboard", "timm", "transformers", "wandb",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _signals_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    set_handler = signal.signal
    # Where a shell has put pytest into the background, a step would ignore its interrupt.
    before = set_handler(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    yield
    set_handler(signal.SIGINT, before)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, everything built, and compute-sanitizer."""
    monkeypatch.setattr(gpu_check, "machine", lambda _: {"gpu": "NVIDIA H200", "build": BUILT})
    monkeypatch.setattr(gpu_check, "sanitizer_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def bench_file(folder: Path, text: str) -> Path:
    path = folder / "test_them.py"
    path.write_text(f"import os, pytest, signal\n{text}")
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("build", "word"),
    [
        ({**BUILT, "problem": "the C++ extension is not built"}, "not built"),
        ({**BUILT, "cuda_architectures": []}, "without CUDA"),
    ],
)
def test_an_extension_that_is_not_built_ends_it(
    build: dict, word: str, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Most tests would skip, and the check would pass."""
    monkeypatch.setattr(gpu_check, "machine", lambda _: {"gpu": "NVIDIA H200", "build": build})
    monkeypatch.setattr(gpu_check, "check", lambda *_: {"outcome": "passed", "seconds": 1.0})
    output = ["--output", str(tmp_path / "h200.json")]
    assert gpu_check.main(output) == 1
    assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert gpu_check.main([*output, "--allow-missing-extension"]) == 0


def test_a_machine_without_git_or_driver_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    facts = gpu_check.machine()
    assert (facts["commit"], facts["uncommitted_changes"], facts["driver"]) == (None,) * 3
    assert facts["build"]["torch"] == torch.__version__
    assert gpu_check.machine("abc")["commit"] == "abc"


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "nvidia-h200.json"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb.json")],
)
def test_file_name(gpu: str, name: str) -> None:
    assert gpu_check.file_name(gpu) == name


@pytest.mark.parametrize(
    ("program", "outcome"),
    [("pass", "passed"), ("raise SystemExit(3)", "failed"), ("while True: pass", "cut off")],
)
def test_outcome_of_a_step(program: str, outcome: str) -> None:
    seconds = 0.2 if outcome == "cut off" else 60
    result = gpu_check.run("step", [sys.executable, "-c", program], seconds)
    assert result["outcome"] == outcome
    assert (result["status"] == 3) == (outcome == "failed")


def test_a_step_that_is_cut_off_may_report_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """In sh, what runs in the background ignores the interrupt."""
    script = "sleep 60 & echo $! > child; trap 'echo kept > report; exit' INT; sleep 60"
    result = gpu_check.run("step", ["sh", "-c", f"cd {tmp_path}; {script}"], 2)
    assert result["outcome"] == "cut off"
    assert (tmp_path / "report").read_text() == "kept\n"
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "cmdline")
    for _ in range(100):  # a process is dead a moment after it was killed
        if not child.exists() or not child.read_bytes():
            return
        time.sleep(0.01)
    pytest.fail("what the step had started runs on")


def test_a_step_that_ignores_the_interrupt_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.1)
    result = gpu_check.run("step", ["sh", "-c", "trap '' INT; sleep 60; sleep 60"], 2)
    assert result["outcome"] == "cut off"
    assert result["status"] == -signal.SIGKILL


def test_rows_of_a_run_that_is_killed(tmp_path: Path) -> None:
    """Each is kept as soon as it is measured, as the ratios read them."""
    path = bench_file(
        tmp_path,
        f"""
PROVIDERS = ["dvla_fast", "2xSDPA+lerp flash", "killed"]

@pytest.mark.parametrize("provider", PROVIDERS)
def test_it(benchmark, provider):
    benchmark.group = {GROUP!r}
    benchmark.extra_info["peak_mib"] = 1.5
    if provider == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    benchmark.pedantic(lambda: None, rounds=2)
""",
    )
    kept = tmp_path / "rows"
    options = ["-p", "benchmarks.conftest", f"--rows={kept}", "-p", "no:cacheprovider"]
    # Benchmarks are off in the processes of pytest-xdist, which may run this test.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout
    first, second = (json.loads(line) for line in kept.read_text().splitlines())
    assert (first["provider"], second["provider"]) == ("dvla_fast", "2xSDPA+lerp flash")
    assert first["peak_mib"] == 1.5
    first["median_us"], second["median_us"] = 20.0, 60.0
    (row,) = rows({"medians": [first, second]})
    assert row["ratio"] == pytest.approx(3.0)
    assert GROUP in markdown([row])


def step_of(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    path = bench_file(folder, text)
    # The root that pytest would find, and names count from, depends on where the project lies.
    step = [*gpu_check.PYTEST, f"--rootdir={folder}", str(path)]
    monkeypatch.setattr(gpu_check, "command", lambda *_: step)
    return gpu_check.check("tests", 60, folder, folder / "rows")


def test_failed_tests_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
@pytest.fixture
def broken(): raise OSError
def test_good(): pass
@pytest.mark.parametrize("x", [1, 2])
def test_bad(x): assert x == 1
def test_ugly(broken): pass
"""
    result = step_of(text, tmp_path, monkeypatch)
    assert result["outcome"] == "failed"
    assert result["failed"] == ["test_them.py::test_bad[2]", "test_them.py::test_ugly"]
    assert [result[name] for name in ("tests", "failures", "errors", "skipped")] == [4, 1, 1, 0]
    said = gpu_check.summary({"tests": {**result, "failed": result["failed"] * 20}})
    assert said.count("test_bad[2]") == 10
    assert "and 20 more" in said


def test_a_step_whose_tests_all_skip_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = step_of("def test_it(): pytest.skip('no')", tmp_path, monkeypatch)
    assert result["outcome"] == "failed: no test ran"


def test_compute_sanitizer_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = gpu_check.sanitizer_problem.__wrapped__  # not the remembered one
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert problem() == "compute-sanitizer is not installed"
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "run", lambda *_: {"outcome": "failed"})
    assert problem() == "compute-sanitizer does not work here"
    monkeypatch.setattr(gpu_check, "run", lambda *_: {"outcome": "passed"})
    assert problem() is None


def test_steps_are_added_to_an_earlier_record(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two calls, one record: what the second does not do, or measure, stays as it was."""
    old, slow = {**ROW, "provider": "old"}, {**ROW, "median_us": 30.0}
    checks = {"eager": {"outcome": "passed", "seconds": 3}, "gate": {"outcome": "failed"}}
    earlier = {"gpu": "NVIDIA H200", "commit": "abc", "checks": checks, "medians": [old, slow]}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    machine = {"gpu": "NVIDIA H200", "commit": "abc", "build": BUILT}
    monkeypatch.setattr(gpu_check, "machine", lambda _: dict(machine))

    def check(name: str, seconds: float, folder: Path, rows: Path) -> dict[str, Any]:
        rows.write_text(json.dumps(ROW) + "\n")
        return {"outcome": "passed", "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "check", check)
    output = tmp_path / "h200.json"
    options = ["--steps", "gate", "--output", str(output), "--onto", str(tmp_path / "earlier.json")]
    assert gpu_check.main(options) == 0
    record = json.loads(output.read_text())
    assert record["medians"] == [old, ROW]
    assert record["checks"]["eager"] == checks["eager"]
    assert record["checks"]["gate"]["outcome"] == "passed"
    assert record["checks"]["tests"]["outcome"] == "not run: not asked for"
    output.unlink()
    for broken, word in (({"commit": "other"}, "its commit is other"), ({"gpu": None}, "its gpu")):
        (tmp_path / "earlier.json").write_text(json.dumps(earlier | broken))
        assert gpu_check.main(options) == 1
        assert word in capsys.readouterr().err
    (tmp_path / "earlier.json").write_text("[]")
    assert gpu_check.main(options) == 1
    assert "not a record" in capsys.readouterr().err
    assert not output.exists()


def test_whole_record(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes and rows are in the file after each step; one that fails shows in the status."""
    output = tmp_path / "h200.json"
    steps: list[str] = []

    def run(name: str, command: list[str], seconds: float, **environment: str) -> dict:
        record = json.loads(output.read_text())  # a run that is killed here keeps this
        assert list(record["checks"]) == steps
        assert len(record["medians"]) == len({"eager", "graph"} & set(steps))
        assert 0 < seconds <= gpu_check.BUDGET_SECONDS < 600
        steps.append(name)
        report = next(part for part in command if part.startswith("--junitxml="))
        Path(report.partition("=")[2]).write_text('<testsuite tests="2" skipped="1"/>')
        if name in ("eager", "graph"):
            target = next(part for part in command if part.startswith("--rows="))
            with Path(target.partition("=")[2]).open("a") as rows:
                rows.write(json.dumps(ROW) + "\n")
        outcomes = {"racecheck": "failed", "eager": "cut off"}
        return {"outcome": outcomes.get(name, "passed"), "seconds": 1.0, "status": 0}

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main(["--output", str(output)]) == 1
    assert steps == list(gpu_check.SHARE)
    written = json.loads(output.read_text())
    assert written["gpu"] == "NVIDIA H200"
    assert written["build"] == BUILT
    assert written["checks"]["racecheck"]["outcome"] == "failed"
    assert written["checks"]["eager"]["outcome"] == "cut off"
    assert written["medians"] == [ROW, ROW]


def test_a_check_that_is_ended_keeps_its_rows(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that was half written is none."""
    output = tmp_path / "h200.json"

    def check(name: str, seconds: float, folder: Path, rows: Path) -> dict:
        if name == "eager":
            rows.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:20])
            sys.exit(1)  # as on SIGTERM
        return {"outcome": "passed", "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "check", check)
    with pytest.raises(SystemExit):
        gpu_check.main(["--output", str(output)])
    record = json.loads(output.read_text())
    assert record["medians"] == [ROW]
    assert list(record["checks"]) == ["tests", "kernels"]
    assert list(tmp_path.iterdir()) == [output]


def test_steps_that_are_not_run_say_why(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "check", lambda *_: {"outcome": "passed", "seconds": 1.0})
    monkeypatch.setattr(gpu_check, "sanitizer_problem", lambda: "it is not installed")
    output = tmp_path / "h200.json"
    assert gpu_check.main(["--output", str(output), "--steps", "tests", "memcheck"]) == 0
    checks = json.loads(output.read_text())["checks"]
    assert checks["tests"]["outcome"] == "passed"
    assert checks["memcheck"]["outcome"] == "not run: it is not installed"
    assert checks["graph"]["outcome"] == "not run: not asked for"


def test_no_time_left(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda *_: pytest.fail("it ran"))
    output = tmp_path / "h200.json"
    assert gpu_check.main(["--output", str(output), "--seconds", "20"]) == 1
    outcomes = [check["outcome"] for check in json.loads(output.read_text())["checks"].values()]
    assert outcomes == ["skipped: no time left"] * len(gpu_check.SHARE)


@pytest.mark.parametrize("found", [True, False], ids=["xdist", "alone"])
def test_tests_share_the_cores(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: found or None)
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 16)
    command = gpu_check.command("tests", Path("rows"))
    assert ("-n" in command) == found
    assert not found or command[command.index("-n") + 1] == "16"
    threads = gpu_check.environment("tests")["TORCHINDUCTOR_COMPILE_THREADS"]
    assert threads == ("1" if found else "16")
    assert "-n" not in gpu_check.command("eager", Path("rows"))


def collected(*options: str) -> list[str]:
    """The names of the tests chosen, as a machine without optional packages collects them."""
    code = f"import pytest, sys; sys.modules.update(dict.fromkeys({OPTIONAL})); pytest.main()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "--collect-only", "-p", "no:cacheprovider", *options],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert "ERROR" not in done.stdout, done.stdout[-3000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def gpu_tests() -> list[str]:
    """The names of all tests marked gpu."""
    return collected("-m", "gpu")


@pytest.mark.slow
def test_every_gpu_row_belongs_to_one_step() -> None:
    pytest.importorskip("triton")
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/test_*_gpu.py"))
    # pytest's own choice: its -k looks at the names of files, too
    rows_of = {name: collected(*chosen) for name, chosen in gpu_check.BENCHMARKS.items()}
    assert all(rows_of.values()), rows_of
    assert sorted(collected(*files)) == sorted(row for rows in rows_of.values() for row in rows)


@pytest.mark.slow
def test_every_file_with_gpu_tests_is_run(gpu_tests: list[str]) -> None:
    pytest.importorskip("triton")
    assert {test.partition("::")[0] for test in gpu_tests} == set(gpu_check.GPU_TESTS)


@pytest.mark.slow
def test_what_the_sanitizers_look_at_exists(gpu_tests: list[str]) -> None:
    pytest.importorskip("triton")
    functions = {test.partition("[")[0] for test in gpu_tests}
    assert set(gpu_check.SMALL) <= functions | set(gpu_tests)
    command = gpu_check.command("memcheck", Path("rows"))
    assert command[command.index("--report-api-errors") + 1] == "no"
    assert set(gpu_check.SMALL) < set(command)
