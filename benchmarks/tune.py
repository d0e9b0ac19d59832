"""Tunes the launch table of the dual-attention kernels on the GPU at hand.

    python -m benchmarks.tune                         # default shapes, bfloat16 and float32
    python -m benchmarks.tune --dtypes float16 --shapes 1,80,8,24,196,45 25,1,8,48,49,77
    python -m benchmarks.tune --seconds 500           # as many classes as fit
    python -m benchmarks.tune --dtypes float32 --precision tf32x3

Each shape T,G,H,D,N,P (text groups, images a group, heads, head dimension, image tokens, query and
text tokens) stands for a class of calls: its dtype's size, precision of float32 products, padded
head dimension, and query rows and keys up to the next limit. For each class and kernel the
candidate tiles are compiled, checked against float64 and timed inside a CUDA graph; the fastest
becomes a row of the section of this GPU's generation in kernels/dual_attention/launch_table.json,
which is written after each class. Half types share their rows. For the default shapes more than
800 kernels are compiled.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.test_dual_attention import SHAPES, TOLERANCE, Shape, inputs
from benchmarks.test_dual_attention import exact as exact_results
from dvla_fast.kernels import dual_attention
from dvla_fast.kernels.dual_attention import launch
from dvla_fast.kernels.dual_attention.launch import KERNELS, Tile

# One shape of each class of query rows at the model's head dimensions, then long ones.
DEFAULT_SHAPES = [
    *SHAPES,
    Shape(16, 5, 8, 24, 100, 20),
    Shape(16, 80, 8, 24, 196, 45),
    Shape(16, 5, 8, 48, 25, 20),
    Shape(5, 1, 8, 48, 49, 9),
    Shape(25, 1, 8, 24, 196, 77),
    Shape(25, 1, 6, 64, 49, 9),
    Shape(2, 1, 8, 128, 4096, 1024),
    Shape(2, 8, 8, 64, 2048, 512),
]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Largest error of float32 results, as a share of the largest exact value.
FLOAT32_TOLERANCE = {
    "ieee": TOLERANCE[torch.float32],
    "tf32x3": TOLERANCE[torch.float32],
    "tf32": 1e-2,
}
ROW_LIMITS = (16, 32, 64, 128)
KEY_LIMITS = (64, 256, 1024)
REPEATS = 20

# Seconds a call and shared bytes a block; None for a tile that cannot run or is wrong.
Measure = Callable[[str, Shape, torch.dtype, Tile], tuple[float, int] | None]


class Class(NamedTuple):
    """What a row of the table serves."""

    kernel: str
    element_size: int
    precision: str | None
    head_dim: int
    max_rows: int | None
    max_keys: int | None


def class_of(
    kernel: str, shape: Shape, dtype: torch.dtype, device: launch.Device, precision: str = "ieee"
) -> Class | None:
    """The class of a shape, or None where the kernel has no part in it on this device."""
    if precision == "tf32x3" and shape.width > launch.LARGEST_TF32X3_HEAD_DIM:
        return None  # what runs is "ieee"
    max_rows = next((limit for limit in ROW_LIMITS if shape.rows <= limit), None)
    max_keys = next((limit for limit in KEY_LIMITS if max(shape.keys, shape.rows) <= limit), None)
    element_size = torch.empty(0, dtype=dtype).element_size()
    head_dim = launch.padded(shape.width)
    whole = launch.find_tile(
        "backward", element_size, precision, head_dim, shape.rows, max(shape.keys, shape.rows),
        device,
    )  # fmt: skip
    if kernel.startswith("backward") and (kernel == "backward") != (whole is not None):
        return None
    known = precision if dtype == torch.float32 else None
    return Class(kernel, element_size, known, head_dim, max_rows, max_keys)


def candidates(target: Class) -> Iterator[Tile]:
    """Tiles worth compiling: neither too much nor too little work for a thread's registers."""
    whole = target.kernel == "backward"
    most_rows = target.max_rows or ROW_LIMITS[-1]
    # float32 products run on tensor cores only where asked for: smaller tiles, see the budget file.
    most_elements = 128 * 128 if target.element_size == 2 else 64 * 64
    fewest_rows = most_rows if whole else min(most_rows, 64) // 2
    many_keys = target.max_keys is None or target.max_keys > 256
    for rows in (limit for limit in ROW_LIMITS if fewest_rows <= limit <= most_rows):
        for keys in (16, 32, 64, 128):
            for warps in (4, 8):
                work = max(rows, keys) * max(target.head_dim, min(rows, keys)) / (32 * warps)
                if rows * keys > most_elements or not 8 <= work <= 64:
                    continue
                for stages in (2, 3) if many_keys else (1, 2):
                    yield Tile(rows, keys, warps, stages)


def distinct(target: Class, calls: list[tuple[Shape, torch.dtype]]) -> list[Tile]:
    """The candidates without those that would launch what another one does.

    A launch has no wider block of keys than the longest path of its call.
    """
    keys = max(launch.padded(max(shape.keys, shape.rows)) for shape, _ in calls)
    cut = (replace(tile, keys=min(tile.keys, keys)) for tile in candidates(target))
    return list(dict.fromkeys(cut))


def tune(
    shapes: Iterable[Shape],
    dtypes: Iterable[torch.dtype],
    device: launch.Device,
    measure: Measure,
    report: Callable[[str], None],
    deadline: float = math.inf,
    precision: str = "ieee",
) -> Iterator[dict[str, Any]]:
    """The fastest tile of each class as a row of the table, as soon as it is known.

    Classes without one are left out, and those that are not done by the deadline, which is a time
    of ``time.monotonic``. The measure runs float32 products in the precision.
    """
    members: dict[Class, list[tuple[Shape, torch.dtype]]] = {}
    for shape in shapes:
        for dtype in dtypes:
            for kernel in KERNELS:
                target = class_of(kernel, shape, dtype, device, precision)
                if target is not None:
                    members.setdefault(target, []).append((shape, dtype))
    for number, (target, calls) in enumerate(members.items(), start=1):
        tiles = distinct(target, calls)
        best: tuple[float, Tile, int] | None = None
        for index, tile in enumerate(tiles, start=1):
            if time.monotonic() > deadline:
                report(f"no time left: {len(members) - number + 1} classes left as they were")
                return
            done = []
            for shape, dtype in calls:
                result = measure(target.kernel, shape, dtype, tile)
                if result is None:
                    break
                done.append(result)
            if len(done) < len(calls):
                continue
            # Every call of a class counts alike, however long it takes.
            mean = math.exp(sum(math.log(seconds) for seconds, _ in done) / len(done))
            if best is None or mean < best[0]:
                best = (mean, tile, max(shared for _, shared in done))
                report(
                    f"[{number}/{len(members)}] {target}: {index}/{len(tiles)}"
                    f" {tile} {mean * 1e6:.1f} µs"
                )
        if best is None:
            report(f"[{number}/{len(members)}] {target}: no candidate runs; left as it was")
            continue
        _, tile, shared = best
        yield {**target._asdict(), **vars(tile), "shared": shared}


@contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, `kernel` runs with this tile whatever the table says."""
    find = launch.find_tile

    def chosen(name: str, *shape: Any) -> Tile | None:
        if name == kernel:
            return tile
        streaming = kernel in ("backward_rows", "backward_keys")
        return None if name == "backward" and streaming else find(name, *shape)

    launch.find_tile = chosen
    launch.forget()
    try:
        yield
    finally:
        launch.find_tile = find
        launch.forget()


def measure_on_gpu(
    kernel: str, shape: Shape, dtype: torch.dtype, tile: Tile, precision: str = "ieee"
) -> tuple[float, int] | None:
    """Checks one candidate against float64 on the first group, then times it in a CUDA graph."""
    from triton.runtime.errors import OutOfResources

    tensors, grad_out, saved, expected = problem(shape, dtype)
    scale, products = shape.width**-0.5, {"precision": precision}
    tolerance = TOLERANCE.get(dtype, 5e-2)
    if dtype == torch.float32:
        tolerance = FLOAT32_TOLERANCE[precision]

    def call(save: bool = False) -> tuple[torch.Tensor, ...]:
        if kernel == "forward":
            return dual_attention.forward(*tensors, None, None, scale, save, **products)[:1]
        return dual_attention.backward(grad_out, *tensors, None, None, *saved, scale, **products)

    compiled_variants(kernel).clear()  # shared_bytes counts those of this tile
    with forced(kernel, tile):
        try:
            call(save=True)  # what training runs has to fit as well
            results = call()
        except OutOfResources:
            return None
        wanted = expected[:1] if kernel == "forward" else expected[1:]
        for got, want in zip(results, wanted, strict=True):
            error = (got[: want.shape[0]].double() - want).abs().max() / want.abs().max()
            if not error < tolerance:
                return None
        return seconds_a_call(call), shared_bytes(kernel)


@functools.cache
def problem(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    """On the GPU: the six inputs, the result's gradient, what a backward reads, float64 results.

    The latter are those of the first group: result, then the six gradients.
    """
    *five, alpha, grad_out = (x.cuda() for x in inputs(shape))
    tensors = (*(x.to(dtype) for x in five), alpha)
    saved = dual_attention.forward(*tensors, None, None, shape.width**-0.5, True)[1:]
    return tensors, grad_out.to(dtype), saved, [x.cuda() for x in exact_results(shape)]


def compiled_variants(kernel: str) -> dict[Any, Any]:
    """What a kernel's launcher has compiled in this process, by what it was compiled for."""
    from dvla_fast.kernels.dual_attention.backward import (
        dual_attention_backward_keys_kernel,
        dual_attention_backward_rows_kernel,
    )
    from dvla_fast.kernels.dual_attention.forward import dual_attention_forward_kernel

    function = {
        "forward": dual_attention_forward_kernel,
        "backward_keys": dual_attention_backward_keys_kernel,
    }.get(kernel, dual_attention_backward_rows_kernel)
    variants: dict[Any, Any] = function.device_caches[torch.cuda.current_device()][0]
    return variants


def shared_bytes(kernel: str) -> int:
    """The most that any compiled variant takes: a tile may need several launches."""
    return max(int(variant.metadata.shared) for variant in compiled_variants(kernel).values())


def seconds_a_call(call: Callable[[], object]) -> float:
    """Median over replays of a CUDA graph of REPEATS calls: no launch overhead of Python's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / REPEATS)
    return sorted(times)[len(times) // 2]


def facts() -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def parse_shape(text: str) -> Shape:
    sizes = [int(part) for part in text.split(",")]
    if len(sizes) != len(Shape._fields) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected six positive numbers T,G,H,D,N,P")
    return Shape(*sizes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="T,G,H,D,N,P")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--precision",
        choices=list(launch.PRECISIONS),
        default="ieee",
        help="how float32 products run, as set_float32_precision has it (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=launch.TABLE, help="table to write into")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no measurement after this long"
    )
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    if not torch.cuda.is_available():
        print("benchmarks.tune: no CUDA device here; tuning measures on one", file=sys.stderr)
        return 1
    device = launch.device_of(torch.device("cuda", torch.cuda.current_device()))
    found = tune(
        options.shapes or DEFAULT_SHAPES,
        [DTYPES[name] for name in options.dtypes],
        device,
        functools.partial(measure_on_gpu, precision=options.precision),
        lambda line: print(line, file=sys.stderr, flush=True),
        deadline,
        options.precision,
    )
    rows = []
    for row in found:
        rows.append(row)
        launch.write_section(options.output, device.generation, facts(), [row])
    print(f"{len(rows)} rows of {device.generation} written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
