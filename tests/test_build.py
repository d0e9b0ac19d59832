"""The build: what it asks for, and an installation where nothing can be compiled."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, check=False, cwd="/", env={**os.environ, **env},
    )  # fmt: skip


@pytest.mark.parametrize("has_torch", [True, False])
def test_the_backend_asks_for_torch_only_where_there_is_none(
    has_torch: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    monkeypatch.chdir(ROOT)
    import backend

    folder = tmp_path / "site-packages"
    if has_torch:
        (folder / "torch").mkdir(parents=True)
        (folder / "torch" / "__init__.py").touch()
    monkeypatch.setattr(backend, "site_packages", lambda: [str(folder)])
    wanted = backend._torch()
    assert any(requirement.startswith("torch") for requirement in wanted) != has_torch


def test_an_old_setuptools_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    monkeypatch.delitem(sys.modules, "backend", raising=False)
    monkeypatch.setattr("setuptools.__version__", "68.1.2")
    with pytest.raises(SystemExit, match=r"setuptools 68\.1\.2 is too old .*setuptools>=77"):
        importlib.import_module("backend")


@pytest.mark.parametrize(
    ("release", "cuda", "found"),
    [("13.1", "13.0", True), ("12.9", "13.0", False), ("13.0", None, False)],
)
def test_nvcc_that_is_on_no_path(
    release: str, cuda: str | None, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    from native import nvcc

    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(
        f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.88\n"
    )
    compiler.chmod(0o755)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("CUDA_HOME", str(compiler.parents[1]))
    assert (nvcc(cuda) == str(compiler)) == found
    monkeypatch.setenv("CUDACXX", "/elsewhere/nvcc")
    assert nvcc(cuda) == "/elsewhere/nvcc"


def test_switches_are_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVLA_FAST_CUDA=OFF would build the CUDA kernels, silently."""
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    build = runpy.run_path("setup.py")["CMakeBuild"]
    monkeypatch.setenv("DVLA_FAST_EXTENSION", "false")
    with pytest.raises(SystemExit, match="DVLA_FAST_EXTENSION='false': expected 0 or 1"):
        build._cannot_build(None)
    monkeypatch.setenv("DVLA_FAST_CUDA", "OFF")
    with pytest.raises(SystemExit, match="DVLA_FAST_CUDA='OFF': expected 0 or 1"):
        build._wants_cuda(None, None)


def test_one_floor_for_python_and_for_torch() -> None:
    """What pyproject.toml asks for is what the build installs and the documentation says."""
    stated = (ROOT / "pyproject.toml").read_text()
    torch, python = (
        re.search(rf'{name} ?(?:= ")?>=([\d.]+)"', stated)[1] for name in ("torch", "python")
    )
    for path in ("build_tools/backend.py", "Makefile"):
        assert re.findall(r"torch>=([\d.]+)", (ROOT / path).read_text()) == [torch]
    assert f"needs Python ≥ {python} and torch ≥ {torch}." in (ROOT / "docs/install.md").read_text()
    assert f"They need Python ≥ {python}," in (ROOT / "README.md").read_text()
    assert f"Python >= {python} " in (ROOT / "Makefile").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["no C++ compiler found", "DVLA_FAST_EXTENSION=0"])
def test_installs_without_a_compiler(reason: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    ignored = ["--exclude=./.venv", "--exclude=./build", "--exclude=*.so", "--exclude=./.git"]
    source.mkdir()
    archive = subprocess.Popen(
        ["tar", "-C", str(ROOT), *ignored, "-cf", "-", "."], stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-C", str(source), "-xf", "-"], stdin=archive.stdout, check=True)
    assert archive.wait() == 0
    env = {"DVLA_FAST_EXTENSION": "0"}
    if "compiler" in reason:
        env = {"PATH": str(tmp_path / "empty"), "CXX": "no-such-compiler"}
    installed = run(
        sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps",
        "--no-index", "--target", target, source, **env,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert (installed.stdout + installed.stderr).count(reason) == 1
    code = (
        "import torch, dvla_fast, dvla_fast.kernels, dvla_fast.functional as F;"
        "assert dvla_fast.__file__.startswith(" + repr(str(target)) + "), dvla_fast.__file__;"
        "F.beta_policy(torch.zeros(2), 1.0); dvla_fast.RLAGate(384)"
    )
    # -S and an explicit path keep the editable installation under test out of the way.
    paths = os.pathsep.join([str(target), *(p for p in sys.path if p.endswith("site-packages"))])
    done = run(sys.executable, "-S", "-c", code, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the C++ extension is not built") == 1


ARM_COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(
    not shutil.which(ARM_COMPILER), reason=f"no {ARM_COMPILER} (Debian: g++-aarch64-linux-gnu)"
)
def test_the_cpu_kernels_compile_for_arm(tmp_path: Path) -> None:
    """Checked, not translated: torch's headers are the same on every machine."""
    from torch.utils.cpp_extension import include_paths

    source = tmp_path / "all.cpp"
    paths = [ROOT / "csrc/register.cpp", ROOT / "csrc/beta/beta_cpu.cpp"]
    paths += [
        path
        for part in ("attention", "gate", "policy")
        for path in (ROOT / "csrc" / part).glob("*.cpp")
    ]
    source.write_text("".join(f'#include "{path}"\n' for path in paths))
    flags = ["-std=c++20", "-fsyntax-only", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-Wno-psabi"]
    flags += ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", f"-I{ROOT / 'csrc'}"]
    includes = [flag for folder in include_paths() for flag in ("-isystem", folder)]
    done = run(ARM_COMPILER, *flags, *includes, source)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("language", "path"), [("cpp", "csrc/beta/series.h"), ("triton", "kernels/beta_series.py")]
)
def test_the_series_on_disk_are_what_their_script_writes(language: str, path: str) -> None:
    """Numbers only: the files on disk have been through a formatter."""
    written = run(sys.executable, ROOT / "build_tools" / "series.py", language).stdout
    number = re.compile(r"-?0x[0-9a-f.]+p[-+]\d+f?|-?\d\.\d+(?:e[-+]\d+)?")
    assert number.findall(written) == number.findall((ROOT / path).read_text()) != []


def test_the_source_distribution_has_what_a_build_needs(tmp_path: Path) -> None:
    """And nothing that building or testing in the repository leaves there."""
    source = tmp_path / "source"  # setup.py looks for its files in the folder that it runs in
    parts = ("csrc", "build_tools", "dvla_fast", "kernels", "configs")
    unbuilt = shutil.ignore_patterns("*.so", "lib", "__pycache__")
    for name in parts:
        shutil.copytree(ROOT / name, source / name, ignore=unbuilt)
    for name in (
        *("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in"),
        *("README.md", "CHANGELOG.md", "LICENSE"),
    ):
        shutil.copy(ROOT / name, source)
    needed = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    for left in ("build_tools/__pycache__/native.pyc", "dvla_fast/_calls.so", "tests/test_a.py"):
        (source / left).parent.mkdir(exist_ok=True)
        (source / left).touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"],
        capture_output=True, text=True, check=False, cwd=source,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (listed,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    assert needed == {line for line in listed.read_text().splitlines() if "egg-info" not in line}
