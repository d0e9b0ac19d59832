"""Pictures that commands leave in run folders: PNG files, drawn by matplotlib.

They are drawn from plain numbers; nothing here knows runs or data sets. What all of them share is
in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dvla_fast.errors import MissingDependencyError

# Colour-blind safe (Okabe and Ito); grey for what is only there to compare with.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#8E5BA6", "#9AA5B1"
INK, MUTED, GRID = "#1F2933", "#616E7C", "#E4E7EB"
# Of scripts that matplotlib's own font lacks: on Linux, macOS and Windows.
_OTHER_SCRIPTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAGothic",
    "Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS",
)  # fmt: skip
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


def require_matplotlib() -> None:
    """Raise MissingDependencyError, with the remedy, unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib, which is not installed; run pip install 'dvla-fast[train]'"
        ) from error


@contextmanager
def styled() -> Iterator[None]:
    """Draw charts in the package's own style (MissingDependencyError without matplotlib)."""
    require_matplotlib()
    from matplotlib.style import context

    with context(_STYLE):
        yield


def new_figure(width: float, height: float, dpi: int, **options: Any) -> Any:
    """Return a white figure without global state: safe in threads and without a display.

    Args:
        width, height: in inches.
        options: as ``matplotlib.figure.Figure`` takes them.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def fonts() -> tuple[list[str], Callable[[str], bool]]:
    """Return font families for names in any script, and whether they have a text's letters."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)]
    letters: set[int] = set()
    for family in families:
        letters |= font_manager.get_font(font_manager.findfont(family)).get_charmap().keys()
    return families, lambda text: all(ord(letter) in letters for letter in text)


def plain(name: str, longest: int = 28) -> str:
    """Make a name fit for matplotlib: cut, and without formulas, which it sees between two $."""
    cut = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return cut.replace("$", r"\$")
