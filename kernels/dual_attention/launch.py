"""Launch choice of the dual-attention kernels: shape, dtype and device in, tile sizes out.

One table (``launch_table.json``), read by one function; nothing is tuned while a program runs, so
a new shape costs no search and a launch is safe inside CUDA-graph capture. The table has a section
for each GPU generation that was tuned (``python -m benchmarks.tune`` writes it) and a default one,
whose rows were chosen by compiling candidates ahead of time: tiles that spill at most a few
registers and fit the shared memory of every GPU from sm_80 on.

A row serves the calls of its kernel, element size, precision (null for half types, which know none)
and padded head dimension with at most ``max_rows`` query rows and ``max_keys`` keys (null: any), on
devices that have its shared memory, unless half of its tile would be padding. The first such row is
taken, the device's section first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

TABLE = Path(__file__).with_name("launch_table.json")

# forward: a program walks over all keys. backward: likewise, and every query row fits in it, so it
# makes each gradient. backward_rows and backward_keys: the gradients of queries and of keys apart.
KERNELS = ("forward", "backward", "backward_rows", "backward_keys")

# Dot operands are at least 16 wide.
SMALLEST_BLOCK = 16
LARGEST_HEAD_DIM = 256

# How float32 products run, each with the precisions of the rows that serve it, in order. One
# product of rounded operands fits where float32 arithmetic does; three take twice the registers.
PRECISIONS = {"ieee": ("ieee",), "tf32x3": ("tf32x3",), "tf32": ("tf32", "ieee")}
# Three products keep both parts of their operands in registers: with wider heads no tile is small
# enough, a thread would spill kilobytes.
LARGEST_TF32X3_HEAD_DIM = 128

# A grid of this many programs per processor hides latency; past it, a program takes several
# images of its group, and the text attention is computed once for all of them.
PROGRAMS_PER_PROCESSOR = 2
MOST_IMAGES_PER_PROGRAM = 16


@dataclass(frozen=True)
class Device:
    """What the choice depends on; the defaults stand in where there is no device to ask.

    Attributes:
        generation: name of the table's section, such as ``"sm_90"``.
        processors: streaming multiprocessors.
        shared: bytes of shared memory that one block may have.
    """

    generation: str = "default"
    processors: int = 132
    shared: int = 101_376  # of sm_86, sm_89 and sm_120, the smallest from sm_80 on


@dataclass(frozen=True)
class Tile:
    """What one program holds: at most this many query rows and keys at a time, in these warps."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """Sizes of one call: T groups of G images, H heads, P rows, N and S keys, head dimension D."""

    element_size: int
    groups: int
    group_size: int
    heads: int
    rows: int
    image_keys: int
    text_keys: int
    head_dim: int
    precision: str = "ieee"


@dataclass(frozen=True)
class Launch:
    """Everything about a launch that is not a tensor.

    Attributes:
        block_p: query rows a program holds.
        block_n: image keys per step.
        block_s: text keys per step.
        block_d: head dimension, padded to a power of two.
        images: images of one group that a program takes one after another.
        warps: warps of a program.
        stages: depth of the software pipeline over keys.
    """

    block_p: int
    block_n: int
    block_s: int
    block_d: int
    images: int
    warps: int
    stages: int


_memories: list[Any] = []
_Function = TypeVar("_Function", bound=Callable[..., Any])


def remembered(function: _Function) -> _Function:
    """Keeps a function's results until :func:`forget`: planning a launch costs more than it."""
    memory = lru_cache(maxsize=1024)(function)
    _memories.append(memory)
    return cast(_Function, memory)


def forget() -> None:
    """After a change of the table: plans and choices are made afresh."""
    for memory in _memories:
        memory.cache_clear()


def choose(kernel: str, problem: Problem, device: Device) -> Launch | None:
    """The launch of ``kernel``, or None where the table has no row for such a problem."""
    keys = max(problem.image_keys, problem.text_keys)
    block_d = padded(problem.head_dim)
    tile = find_tile(
        kernel, problem.element_size, problem.precision, block_d, problem.rows, keys, device
    )
    if tile is None:
        return None
    programs = problem.groups * problem.group_size * problem.heads * -(-problem.rows // tile.rows)
    images = programs // max(1, PROGRAMS_PER_PROCESSOR * device.processors)
    return Launch(
        block_p=tile.rows,
        block_n=min(tile.keys, padded(problem.image_keys)),
        block_s=min(tile.keys, padded(problem.text_keys)),
        block_d=block_d,
        images=max(1, min(images, problem.group_size, MOST_IMAGES_PER_PROGRAM)),
        warps=tile.warps,
        stages=tile.stages,
    )


def find_tile(
    kernel: str,
    element_size: int,
    precision: str,
    block_d: int,
    rows: int,
    keys: int,
    device: Device,
) -> Tile | None:
    """The first row of the table that serves, in the device's section or else in the default."""
    served = PRECISIONS[precision] if element_size == 4 else (None,)
    for section, of in itertools.product((device.generation, "default"), served):
        for row in table_rows(section):
            if (
                (row["kernel"], row["element_size"], row["precision"], row["head_dim"])
                == (kernel, element_size, of, block_d)
                and (row["max_rows"] is None or rows <= row["max_rows"])
                and row["rows"] <= padded(rows)
                and (row["max_keys"] is None or keys <= row["max_keys"])
                and row["shared"] <= device.shared
            ):
                return Tile(row["rows"], row["keys"], row["warps"], row["stages"])
    return None


@remembered
def table_rows(section: str) -> tuple[dict[str, Any], ...]:
    """The rows of one section; none if the table has no such section."""
    return tuple(json.loads(TABLE.read_text()).get(section, {}).get("rows", ()))


def write_section(
    path: Path, section: str, facts: dict[str, str], rows: list[dict[str, Any]]
) -> None:
    """Puts rows into a section of the table file in place of those of the same class.

    Args:
        facts: what the section says of its origin, such as GPU, date and versions.
    """
    table = json.loads(path.read_text())

    def class_of(row: dict[str, Any]) -> tuple[Any, ...]:
        limits = (row[key] if row[key] is not None else 2**31 for key in ("max_rows", "max_keys"))
        precision = row["precision"] or ""
        return (row["kernel"], row["element_size"], precision, row["head_dim"], *limits)

    new = {class_of(row) for row in rows}
    kept = [row for row in table.get(section, {}).get("rows", ()) if class_of(row) not in new]
    table[section] = {**facts, "rows": sorted([*kept, *rows], key=class_of)}
    text = ",\n".join(_section_text(name, content) for name, content in table.items())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{{\n{text}\n}}\n")
    temporary.replace(path)
    forget()


def _section_text(name: str, content: dict[str, Any]) -> str:
    """One section as JSON, a row a line."""
    rows = ",\n".join(f"      {json.dumps(row)}" for row in content["rows"])
    facts = "".join(
        f"    {json.dumps(key)}: {json.dumps(fact)},\n"
        for key, fact in content.items()
        if key != "rows"
    )
    return f'  {json.dumps(name)}: {{\n{facts}    "rows": [\n{rows}\n    ]\n  }}'


def device_of(device: torch.device) -> Device:
    """What the table asks of a device, queried once; it neither stalls nor allocates."""
    return _cuda_device(device.index) if device.type == "cuda" else Device()


@cache
def _cuda_device(index: int | None) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)  # not all of which stubs know
    return Device(
        f"sm_{properties.major}{properties.minor}",
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def padded(length: int) -> int:
    """The power of two, at least 16, that a block of ``length`` elements is padded to."""
    return max(SMALLEST_BLOCK, 1 << max(0, length - 1).bit_length())
