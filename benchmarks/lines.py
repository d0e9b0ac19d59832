"""What the summaries of the records show, and the floors that the project set itself.

Both are lists of groups as the benchmarks name them; ``benchmarks.tables`` reads the records.
"""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("forward", "forward+backward")
EAGER = "¹"  # a row, or a cell, whose peers are eager PyTorch's alone
FEW_SHOT = (
    "T5-G1-H8-D24-N196-P9", "T1-G80-H8-D24-N196-P45", "T1-G80-H8-D48-N49-P45",
    "T16-G80-H8-D48-N49-P45", "T25-G1-H8-D48-N49-P77", "T25-G1-H6-D64-N196-P77",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of a summary.

    Attributes:
        label: what it says.
        groups: names of the records' groups with ``{mode}`` for the two modes; of several, the
            geometric mean of their ratios is shown and the lowest.
        modes: which of them.
    """

    label: str
    groups: tuple[str, ...]
    modes: tuple[str, ...] = MODES


@dataclass(frozen=True)
class Floor:
    """How many times as fast as its peers something was asked to be.

    Attributes:
        figure: what it says.
        groups: as of :class:`Line`; of several, the lowest ratio counts, or the geometric mean.
        asked: the ratio in each mode; ``None``: nothing was asked.
        peers: how the names of the peers begin that count; empty: all of them.
        mean: the geometric mean counts.
    """

    figure: str
    groups: tuple[str, ...]
    asked: tuple[float | None, float | None]
    peers: str = ""
    mean: bool = False


def attention(dtype: str, shapes: tuple[str, ...] = FEW_SHOT, how: str = "") -> tuple[str, ...]:
    return tuple(f"dual_attention {shape} {dtype} {{mode}}{how}" for shape in shapes)


def gate(images: int, width: int, dtype: str, how: str = "") -> tuple[str, ...]:
    tokens = {192: 196, 384: 49}[width]
    return (f"RLAGate B{images}-d{width}-N{tokens}-P45 {dtype} {{mode}}{how}",)


CPU_LINES = [
    Line("`beta_policy`, 5 states", ("beta_policy {mode} n=5",)),
    Line(
        "the same in a REINFORCE loss, with backward",
        ("beta_policy REINFORCE loss {mode} n=5",),
        MODES[1:],
    ),
    Line("`beta_policy`, 1,000,000 states", ("beta_policy {mode} n=1000000",)),
    Line(
        f"`gate_policy`, one episode of 5 images {EAGER}",
        ("gate_policy T1-G5-N196-P9-d192 float32 {mode}",),
    ),
    Line(f"of 25 images {EAGER}", ("gate_policy T1-G25-N49-P45-d384 float32 {mode}",)),
    Line(f"of 80 images {EAGER}", ("gate_policy T1-G80-N196-P45-d192 float32 {mode}",)),
    Line(
        "`dual_attention`, six few-shot shapes, geometric mean (lowest)", attention("float32")
    ),
    Line("the same in bfloat16", attention("bfloat16")),
    Line(
        "`dual_attention`, 4096 × 1024 tokens",
        attention("float32", ("T2-G1-H8-D64-N4096-P1024",)),
    ),
    Line("the same in bfloat16", attention("bfloat16", ("T2-G1-H8-D64-N4096-P1024",))),
    *(
        Line(label, gate(images, width, dtype))
        for images in (80, 1280)
        for width in (192, 384)
        for label, dtype in (
            (f"`RLAGate`, {images} images, d = {width}", "float32"),
            ("the same in bfloat16", "bfloat16"),
        )
    ),
]  # fmt: skip
LONG = ("T2-G1-H16-D64-N2048-P2048", "T2-G1-H8-D128-N2048-P2048", "T1-G1-H8-D128-N8192-P8192")
GRAPHS = FEW_SHOT[:3]
GPU_LINES = [
    Line("`dual_attention`, six few-shot shapes, bfloat16", attention("bfloat16", how=" eager")),
    Line("the same in float16", attention("float16", how=" eager")),
    Line("three of them in CUDA graphs, bfloat16", attention("bfloat16", GRAPHS, " graph")),
    Line("2,048 tokens and more, bfloat16", attention("bfloat16", LONG, " eager")),
    *(
        Line(f"`beta_policy`, {n:,} states", (f"beta_policy n={n} {{mode}} eager",))
        for n in (100, 1600, 10_000_000)
    ),
    Line("100 states in a CUDA graph", ("beta_policy n=100 {mode} graph",)),
    *(
        Line(label, (f"gate_policy {case} float32 {{mode}} eager",))
        for label, case in (
            ("`gate_policy`, one episode of 5 images", "T1-G5-N196-P9-d192"),
            ("of 80 images", "T1-G80-N196-P45-d192"),
        )
    ),
    *(
        Line(f"`RLAGate`, {images} images, d = {width}, bfloat16",
             gate(images, width, "bfloat16", " eager"))
        for images in (80, 1280)
        for width in (192, 384)
    ),
    Line("80 images in a CUDA graph, d = 192, bfloat16", gate(80, 192, "bfloat16", " graph")),
    Line(
        "pre-training Visformer-Tiny, 224 px",
        ("pretraining visformer_tiny 224 px 2048 images",), MODES[1:],
    ),
    Line("meta-tuning it", ("meta-tuning visformer_tiny 224 px 16 episodes",), MODES[1:]),
]  # fmt: skip
CPU_FLOORS = [
    Floor(
        "`beta_policy`, 5 to 100 states",
        tuple(f"beta_policy {{mode}} n={n}" for n in (5, 25, 100)), (10, 6),
    ),
    Floor("`beta_policy`, 1,000,000 states", ("beta_policy {mode} n=1000000",), (12, 8)),
    *(
        Floor(figure, (f"gate_policy {case} float32 {{mode}}",), (3, 3))
        for figure, case in (
            ("`gate_policy`, 5 images of 196 tokens", "T1-G5-N196-P9-d192"),
            ("`gate_policy`, 25 images of 49 tokens", "T1-G25-N49-P45-d384"),
            ("`gate_policy`, 80 images of 196 tokens", "T1-G80-N196-P45-d192"),
            ("`gate_policy`, 1,280 images of 49 tokens", "T16-G80-N49-P45-d384"),
            ("`gate_policy`, 1,600 states", "T1600-G1-N1-P1-d192"),
        )
    ),
    *(
        Floor(figure, attention(dtype), asked, mean=mean)
        for dtype, of_mean, of_lowest in (
            ("float32", (1.8, 2), (1.3, 1.5)), ("bfloat16", (2.5, 2.5), (1.5, 1.5)),
        )
        for figure, asked, mean in (
            (f"`dual_attention`, few-shot shapes, {dtype}, geometric mean", of_mean, True),
            (f"`dual_attention`, few-shot shapes, {dtype}, lowest", of_lowest, False),
        )
    ),
    *(
        Floor(
            f"`dual_attention`, 4096 × 1024 tokens, {dtype}",
            attention(dtype, ("T2-G1-H8-D64-N4096-P1024",)), (1, 1),
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Floor(
            f"`RLAGate`, {images:,} images, d = {width}, float32, beside eager PyTorch",
            gate(images, width, "float32"), asked, "eager ",
        )
        for images, asked in ((80, (2.2, 2)), (1280, (3, 2.2)))
        for width in (192, 384)
    ),
]  # fmt: skip
GPU_FLOORS = [
    *(
        Floor(f"`dual_attention`, few-shot shapes, {dtype}, lowest",
              attention(dtype, how=" eager"), (3, 2.5))
        for dtype in ("bfloat16", "float16")
    ),
    Floor("`dual_attention` in CUDA graphs, bfloat16, lowest, beside compiled PyTorch",
          attention("bfloat16", GRAPHS, " graph"), (1.5, 1.3)),
    Floor("`dual_attention`, 2,048 tokens and more, bfloat16, lowest",
          attention("bfloat16", LONG, " eager"), (1, 1)),
    Floor("`beta_policy`, 5 to 1,600 states, beside eager PyTorch",
          tuple(f"beta_policy n={n} {{mode}} eager" for n in (5, 100, 1600)), (10, None), "eager "),
    Floor("`beta_policy`, 100 and 1,600 states, beside compiled PyTorch",
          tuple(f"beta_policy n={n} {{mode}} eager" for n in (100, 1600)), (3, None),
          "torch.compile"),
    Floor("`gate_policy`, lowest, beside eager PyTorch",
          tuple(f"gate_policy {case} float32 {{mode}} eager" for case in (
              "T1-G5-N196-P9-d192", "T1-G25-N49-P45-d384", "T1-G80-N196-P45-d192",
              "T16-G80-N49-P45-d384", "T1600-G1-N1-P1-d192",
          )), (5, 5), "eager "),
    Floor("pre-training Visformer-Tiny, 224 px",
          ("pretraining visformer_tiny 224 px 2048 images",), (None, 5)),
    Floor("meta-tuning it", ("meta-tuning visformer_tiny 224 px 16 episodes",), (None, 5)),
]  # fmt: skip
