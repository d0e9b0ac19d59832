"""The CUDA source of the policy, run on the CPU: every thread of every block, one after another.

Its kernels share nothing between threads, so a loop is a launch. Checked are the kernels' own
lines and their launches: indices, the order of draws, what is written where, errors. What a GPU
alone can show (its rounding, its memory) is left to the tests marked ``gpu``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dvla_fast import _extension

COMPILER = "g++"
pytestmark = [
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}"),
    pytest.mark.skipif(_extension.problem is not None, reason="the C++ extension is not built"),
]
CSRC = Path(__file__).resolve().parents[2] / "csrc"
CPU = torch.ops.dvla_fast

# CUDA's words for a host compiler, in the place of the two headers that bring them.
WORDS = """
#pragma once
#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>
#define __global__
#define __device__
#define __launch_bounds__(threads)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(truth) TORCH_CHECK_VALUE(truth, #truth)
struct Index { unsigned x; };
inline Index blockIdx, threadIdx;
template <class Kernel>
auto on_every_thread(Kernel kernel, unsigned blocks, unsigned threads) {
  return [=](auto... arguments) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
  };
}
"""
LAUNCH = re.compile(r"(\w+<T>)\s*<<<(\w+), (\w+), 0, [^>]*>>>")
NAME = "beta_cuda_on_the_cpu"


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    from torch.utils.cpp_extension import include_paths, library_paths

    folder = tmp_path_factory.mktemp("beta_cuda")
    (folder / "c10/cuda").mkdir(parents=True)
    (folder / "c10/cuda/CUDAException.h").write_text(WORDS)
    (folder / "c10/cuda/CUDAStream.h").write_text("#pragma once\n")
    text, launches = LAUNCH.subn(
        r"on_every_thread(\1, \2, \3)", (CSRC / "beta/beta_cuda.cu").read_text()
    )
    text = text.replace("TORCH_LIBRARY_IMPL(dvla_fast, CUDA, m)", f"TORCH_LIBRARY({NAME}, m)")
    text, ops = re.subn(r"m\.impl\(", "m.def(", text)
    assert (launches, ops) == (2, 2)
    source, library = folder / "beta_cuda.cpp", folder / "libbeta_cuda.so"
    source.write_text(text)
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-psabi", "-shared", "-fPIC", f"-I{folder}", f"-I{CSRC}"]
    links = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    command = [COMPILER, *flags, *includes, str(source), "-o", str(library), *links]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    return getattr(torch.ops, NAME)


def states(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means from 1e-6 to 1 - 1e-6, concentrations from 1e-2 to 1e6, in no order."""
    generator = torch.Generator().manual_seed(n)
    mean = torch.linspace(-13.8, 13.8, n, dtype=dtype)[torch.randperm(n, generator=generator)]
    return mean, 10 ** torch.linspace(-2, 6, n, dtype=dtype)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """To the bit: every operation is written out, and rounded alike everywhere."""
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 5000])
def test_it_computes_what_the_cpu_does(cuda: SimpleNamespace, n: int, dtype: torch.dtype) -> None:
    logits, kappa = states(n, dtype)
    key = torch.tensor([-7_000_000_000, 1 << 40])
    for concentration, number in ((kappa, 0.0), (None, 10.0), (None, 0.05)):
        drawn = CPU.beta_policy_forward(logits, concentration, number, None, key, True)
        for action, words in ((None, key), (None, None), (drawn[1].flip(0), None)):
            arguments = (logits, concentration, number, action, words)
            want = CPU.beta_policy_forward(*arguments, True)
            same(cuda.beta_policy_forward(*arguments, True, True), want)
            same(cuda.beta_policy_forward(*arguments, False, False)[:4], want[:4])
        by, everywhere = logits.flip(0), torch.tensor(2.0, dtype=dtype).expand(n)
        for grads in ((by, None), (None, by), (by, logits), (everywhere, by)):
            want = CPU.beta_policy_backward(drawn[4], *grads)
            same(cuda.beta_policy_backward(drawn[4], *grads), want)


@pytest.mark.parametrize("name", ["logits", "concentration", "action_logit"])
def test_invalid_values_stop_it_or_poison_their_element(cuda: SimpleNamespace, name: str) -> None:
    logits, kappa = states(130, torch.float32)
    values = {"logits": logits, "concentration": kappa, "action_logit": logits.flip(0)}
    values[name][129] = torch.nan
    key = torch.tensor([3, 0])
    actions = [values.pop("action_logit")] + ([None] if name != "action_logit" else [])
    for action in actions:
        arguments = (values["logits"], values["concentration"], 0.0, action, key)
        with pytest.raises(ValueError, match=f"{name}: "):
            cuda.beta_policy_forward(*arguments, True, True)
        for result in cuda.beta_policy_forward(*arguments, True, False):
            assert bool(result[..., :129].isfinite().all())
            assert bool(result[..., 129].isnan().all())
