"""Launch choice of the dual-attention kernels: shape and dtype in, tile sizes out.

One table, read by one function; nothing is tuned while a program runs, so a new shape costs no
search and a launch is safe inside CUDA-graph capture. The rows were chosen by compiling candidates
for sm_80 and sm_90 and keeping tiles that spill at most a few registers (none without masks) and
fit the shared memory of every GPU from sm_80 on; they are not tuned on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

# Dot operands are at least 16 wide.
SMALLEST_BLOCK = 16
LARGEST_HEAD_DIM = 256

# A grid of this many programs per processor hides latency; past it, a program takes several
# images of its group, and the text attention is computed once for all of them.
PROGRAMS_PER_PROCESSOR = 2
MOST_IMAGES_PER_PROGRAM = 16


@dataclass(frozen=True)
class Tile:
    """What one program holds: at most this many query rows and keys at a time, in these warps."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ForwardLaunch:
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


# (bytes per element, padded head dimension) -> tiles by rising number of rows. The first tile that
# covers all query rows serves; longer queries take several of the last.
FORWARD_TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (2, 16): (Tile(16, 128, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    (2, 32): (Tile(16, 128, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    (2, 64): (Tile(16, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    (2, 128): (Tile(16, 64, 4, 2), Tile(32, 32, 4, 2), Tile(64, 64, 8, 2)),
    (2, 256): (Tile(16, 32, 4, 2), Tile(32, 32, 8, 2)),
    (4, 16): (Tile(16, 64, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 4, 2)),
    (4, 32): (Tile(16, 64, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
    (4, 64): (Tile(16, 32, 4, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2)),
    (4, 128): (Tile(16, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 256): (Tile(16, 16, 8, 2),),
}


def choose_forward(
    *,
    element_size: int,
    groups: int,
    group_size: int,
    heads: int,
    rows: int,
    image_keys: int,
    text_keys: int,
    head_dim: int,
    processors: int,
) -> ForwardLaunch:
    """The launch for a forward over (T, G, H, P, N, S, D) on a device of ``processors`` SMs."""
    block_d = padded(head_dim)
    tiles = FORWARD_TILES[element_size, block_d]
    tile = next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
    programs = groups * group_size * heads * -(-rows // tile.rows)
    images = programs // max(1, PROGRAMS_PER_PROCESSOR * processors)
    return ForwardLaunch(
        block_p=tile.rows,
        block_n=min(tile.keys, padded(image_keys)),
        block_s=min(tile.keys, padded(text_keys)),
        block_d=block_d,
        images=max(1, min(images, group_size, MOST_IMAGES_PER_PROGRAM)),
        warps=tile.warps,
        stages=tile.stages,
    )


def padded(length: int) -> int:
    """The power of two, at least 16, that a block of ``length`` elements is padded to."""
    return max(SMALLEST_BLOCK, 1 << max(0, length - 1).bit_length())
