"""The build: what it asks for, and an installation where nothing can be compiled."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(
    ("language", "path"), [("cpp", "csrc/beta/series.h"), ("triton", "kernels/beta_series.py")]
)
def test_the_series_on_disk_are_what_their_script_writes(language: str, path: str) -> None:
    """Numbers only: the files on disk have been through a formatter."""
    import re

    written = run(sys.executable, ROOT / "build_tools" / "series.py", language).stdout
    number = re.compile(r"-?0x[0-9a-f.]+p[-+]\d+f?|-?\d\.\d+(?:e[-+]\d+)?")
    assert number.findall(written) == number.findall((ROOT / path).read_text()) != []
