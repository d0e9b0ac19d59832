"""The confusion matrix of an evaluation as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dvla_fast.pictures import GRID, INK, fonts, new_figure, plain

_NAMED = 60  # classes whose names still fit on the axes
_BESIDE = 42  # letters of the names that still fit beside each other below the matrix
_WRITTEN = 15  # classes whose cells still hold a number


def plot_confusion(
    rates: Tensor, names: Sequence[str], output: str | Path, title: str = ""
) -> None:
    """Draw a confusion matrix as a PNG file.

    Args:
        rates: (C, C): share of class i (row) taken for class j, of the times j was a choice; NaN
            where it never was, left grey.
        names: of the C classes; numbers stand for those that no installed font can draw.
        output: file to write, whatever its suffix.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    count = len(names)
    side = min(16.0, 4.5 + 0.22 * count)
    # room for names beside and below, so that long ones take none of the matrix's
    room = 0.085 * max(map(len, map(plain, names))) if count <= _NAMED else 0.0
    figure = new_figure(side + 1.2 + room, side + room, 120, layout="constrained")
    from matplotlib import colormaps

    axis = figure.add_subplot()
    colours = colormaps["Blues"].with_extremes(bad=GRID)
    labels: list[str] = []
    picture = axis.imshow(100 * rates.numpy(), cmap=colours, vmin=0, vmax=100)
    if count <= _NAMED:
        families, drawable = fonts()
        labels = [
            plain(name) if drawable(name) else f"class {index}" for index, name in enumerate(names)
        ]
        turned = count > 6 or count * max(map(len, labels)) > _BESIDE
        look = {"fontsize": 10 if count <= 20 else 6, "fontfamily": families}
        axis.set_xticks(range(count), labels, rotation=90 if turned else 0, **look)
        axis.set_yticks(range(count), labels, **look)
    if count <= _WRITTEN:
        for row in range(count):
            for column in range(count):
                value = rates[row, column].item()
                if value == value:  # not NaN
                    ink = "white" if value > 0.55 else INK
                    text = f"{100 * value:.0f}"
                    axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
    numbered = any(label != plain(name) for label, name in zip(labels, names))
    key = "\nclass n: no installed font has the letters of its name" if numbered else ""
    axis.set_xlabel(f"predicted{key}")
    axis.set_ylabel("true")
    axis.set_title(plain(title, 200), loc="left", fontsize=11)
    bar = figure.colorbar(picture, ax=axis, shrink=0.8)
    never = "; grey: the two were never in one episode" if rates.isnan().any() else ""
    bar.set_label(f"% of queries, where the class was a choice{never}")
    figure.savefig(output, format="png")
