"""Backend selection, and what the package says about itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import dvla_fast
from dvla_fast import _extension, backends
from dvla_fast.errors import BackendError


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = backends.get_backend()
    yield
    backends.set_backend(before)


def test_first_candidate_that_can_run_is_chosen() -> None:
    candidates = (("triton", "no GPU"), ("cpp", None), ("reference", None))
    assert backends.choose("op", candidates, None) == "cpp"
    assert backends.choose("op", candidates, "reference") == "reference"


def test_the_call_outranks_the_process() -> None:
    candidates = (("cpp", None), ("reference", None))
    dvla_fast.set_backend("reference")
    assert backends.choose("op", candidates, None) == "reference"
    assert backends.choose("op", candidates, "cpp") == "cpp"
    dvla_fast.set_backend("triton")  # which this op does not have
    assert backends.choose("op", candidates, None) == "cpp"


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(BackendError, match="op: backend 'triton' cannot run here: no GPU"):
        backends.choose("op", (("triton", "no GPU"), ("reference", None)), "triton")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        dvla_fast.set_backend("fast")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd="/",
        check=False,
    )


def test_environment_variable_forces_the_reference_without_the_extension() -> None:
    code = (
        "import torch, dvla_fast.functional as F; from dvla_fast import _extension;"
        "F.beta_policy(torch.zeros(2), 1.0); print(_extension.capability)"
    )
    done = run_python(code, DVLA_FAST_BACKEND="reference")
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr


def test_an_extension_built_against_another_torch_raises_readably() -> None:
    code = "import torch; torch.__version__ = '2.0.1'\nimport dvla_fast.functional"  # a stand-in
    done = run_python(code)
    if _extension.problem is not None:
        pytest.skip("the C++ extension is not built")
    assert done.returncode != 0
    assert "was built against torch" in done.stderr
    assert "pip install --no-build-isolation -e ." in done.stderr


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_an_extension_of_other_sources_raises_readably() -> None:
    """Loading it would end the process: its ops have other arguments."""
    code = "from dvla_fast import _build_info; _build_info.schemas = ''; import dvla_fast.{}"
    done = run_python(code.format("functional"))
    assert done.returncode == 1
    assert "another version of its sources" in done.stderr
    assert "pip install --no-build-isolation -e ." in done.stderr
    doctor = run_python(code.format("doctor; print(dvla_fast.doctor.report()[0])"))
    assert doctor.returncode == 0, doctor.stderr
    assert "cannot be examined: BackendError" in doctor.stdout


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_an_extension_with_a_part_missing_raises_readably() -> None:
    code = "import sys; sys.modules['dvla_fast._calls'] = None; import dvla_fast.functional"
    done = run_python(code)
    assert done.returncode == 1
    assert "BackendError: dvla_fast: the extension does not load (import of" in done.stderr
    assert "pip install --no-build-isolation -e ." in done.stderr


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_an_extension_that_was_cut_short_raises_readably() -> None:
    code = (
        "from importlib.machinery import ExtensionFileLoader as Loader\n"
        "create = Loader.create_module\n"
        "def cut_short(self, spec):\n"
        "    if spec.name == 'dvla_fast._build_info':\n"
        "        raise ImportError('file too short')\n"
        "    return create(self, spec)\n"
        "Loader.create_module = cut_short\n"
        "import dvla_fast.functional"
    )
    done = run_python(code)
    assert done.returncode == 1
    assert "BackendError: dvla_fast: the extension does not load (file too short)" in done.stderr
    assert "pip install --no-build-isolation -e ." in done.stderr
    assert run_python(code, DVLA_FAST_BACKEND="reference").returncode == 0


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_instruction_set_that_the_cpu_lacks() -> None:
    code = (
        "from dvla_fast import _build_info; _build_info.cpu_runs = lambda: ['default']\n"
        "import dvla_fast.functional"
    )
    done = run_python(code, DVLA_FAST_CPU_CAPABILITY=_extension.capability)
    if _extension.capability == "default":
        pytest.skip("this machine has no other")
    assert done.returncode == 1
    assert "it runs ['default']" in done.stderr


def test_variables_set_to_nothing_are_not_set() -> None:
    names = ("BACKEND", "CPU_CAPABILITY", "FLOAT32_PRECISION", "VALUE_CHECKS")
    done = run_python("import dvla_fast.functional", **{f"DVLA_FAST_{name}": "" for name in names})
    assert done.returncode == 0, done.stderr


def test_triton_is_looked_for_at_import_alone() -> None:
    """torch.compile of 2.11 traces what a call does, and gives up at a search for packages."""
    code = (
        "import importlib.util as u; from dvla_fast import _extension; del u.find_spec;"
        "print(_extension.triton_available())"
    )
    assert run_python(code).stdout.strip() in ("True", "False")


def test_gpus_of_amd_run_plain_pytorch() -> None:
    code = (
        "import torch; torch.version.hip = '7.0'\n"
        "from dvla_fast import _extension\n"
        "print(_extension.triton_available())\n"
        "print(_extension.triton_problem(torch.device('cuda'), torch.float32, 24))\n"
        "print(_extension.beta_triton_problem(torch.device('cuda')))"
    )
    there, *problems = run_python(code).stdout.splitlines()
    assert there == "False"
    for problem in problems:
        assert "ROCm" in problem or "not installed" in problem


def test_a_missing_extension_warns_once_and_works() -> None:
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'dvla_fast._build_info' else real(n, *a)\n"
        "import torch, dvla_fast.functional as F\n"
        "F.beta_policy(torch.zeros(2), 1.0); F.beta_policy(torch.zeros(2), 1.0)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the C++ extension is not built") == 1
    assert "dvla-fast doctor" in done.stderr


@pytest.mark.skipif(_extension.problem is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_gives_the_same_draws(capability: str) -> None:
    """The random stream and its arithmetic are the same bits on every variant."""
    info = dvla_fast.build_info()
    if capability not in info["cpu_capabilities"]:
        pytest.skip(f"{capability} is not built for this processor")
    if capability not in info["cpu_runs"]:
        pytest.skip(f"this CPU does not run {capability}")
    code = (
        "import torch, dvla_fast.functional as F; from dvla_fast import _extension;"
        "g = torch.Generator().manual_seed(1); x = torch.linspace(-4, 4, 500);"
        "o = F.beta_policy(x, 3.0, generator=g);"
        "print(_extension.capability, *(t.double().sum().item().hex() for t in o))"
    )
    here = run_python(code).stdout.split()
    there = run_python(code, DVLA_FAST_CPU_CAPABILITY=capability).stdout.split()
    assert there[0] == capability
    assert there[1:] == here[1:]


def test_build_info_is_complete() -> None:
    info = dvla_fast.build_info()
    assert info["dvla_fast"] == dvla_fast.__version__
    assert info["torch"] == torch.__version__
    if info["problem"] is None:
        assert info["built_against_torch"] == torch.__version__
        assert info["cpu_capability"] in info["cpu_capabilities"]
        assert info["cpu_capability"] in info["cpu_runs"]


def test_importing_the_package_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import dvla_fast; dvla_fast.RLAGate;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'timm', 'sklearn', 'matplotlib', 'PIL', 'rich', 'triton',"
        " 'torchvision', 'safetensors', 'jsonargparse'}))"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
