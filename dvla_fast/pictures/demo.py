"""The picture of a demo run: training curves, rewards, gates over time, results, sample images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from dvla_fast.pictures import (
    BLUE,
    GREEN,
    GREY,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    new_figure,
    plain,
    styled,
)  # fmt: skip
from dvla_fast.statistics import points

_LAYER_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#B07D00", "#3B4A57", "#CC79A7", "#5DA9C9")
_FEW_LAYERS = 4
_SAMPLE = 10  # letters of a name that fit under a sample image

Samples = Mapping[str, Mapping[str, Any]]
"""What classes are to the training -> class -> image, (H, W) or (H, W, C) in [0, 1]; five a row."""


def plot_demo(
    output: str | Path,
    summary: Mapping[str, Any],
    pretrain: Sequence[Mapping[str, Any]],
    metatune: Sequence[Mapping[str, Any]],
    samples: Samples,
    labels: Mapping[str, str],
) -> None:
    """Draw a run of the demo as a PNG file.

    Args:
        output: file to write, whatever its suffix.
        summary: the demo's summary, with its ``results``.
        pretrain, metatune: rows of the metrics of both stages.
        samples: one image of each of a few classes.
        labels: what methods of the results are called, where not by their names.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    layers = [f"stage {stage}, block {block}" for stage, block in summary["gated_layers"]]
    with styled():
        figure = new_figure(13.2, 7.8, 150)
        rows = figure.add_gridspec(
            2, 3, left=0.055, right=0.985, top=0.855, bottom=0.075, wspace=0.36, hspace=0.42
        )
        axes = [figure.add_subplot(rows[row, column]) for row in range(2) for column in range(3)]
        _title(figure, summary)
        _pretraining(axes[0], pretrain)
        _metatuning(axes[1], metatune)
        _rewards(axes[2], metatune, layers)
        _gates(axes[3], metatune, layers)
        for axis in axes[:4]:
            _whole_epochs(axis)
        _results(axes[4], summary["results"], labels)
        axes[5].axis("off")
        _samples(figure, axes[5].get_position(), samples)
        figure.savefig(output, format="png")


def _whole_epochs(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    whole = MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axis.xaxis.set_major_locator(whole)


def _title(figure: Any, summary: Mapping[str, Any]) -> None:
    results = summary["results"]
    count = results[0]["episodes"]
    end = "s" if count > 1 else ""
    scores = "   ".join(
        f"{result['way']}-way {result['shot']}-shot  {100 * result['accuracy']:.1f} ± "
        f"{points(result['ci95'], 1)} %"
        for result in results
    )
    figure.text(
        0.055, 0.962, f"DVLA-RL on {plain(summary['dataset'], 60)}: a gate learned by REINFORCE",
        fontsize=16, fontweight="bold", va="center",
    )  # fmt: skip
    figure.text(
        0.055, 0.922,
        f"Novel classes, learned gate:  {scores}     ({count:,} episode{end} each, "
        "mean and 95 % interval)",
        fontsize=10.5, color=MUTED, va="center",
    )  # fmt: skip


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _pretraining(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("1  Pre-training on the base classes")
    steps, accuracy = _curve(rows, "accuracy")
    (line,) = axis.plot(steps, _percent(accuracy), color=BLUE, label="training accuracy")
    steps, held_out = _curve(rows, "monitor_episode_accuracy")
    (dots,) = axis.plot(
        steps, _percent(held_out), "o-", color=GREEN, markersize=4, linewidth=1.4,
        label="validation images, 1-shot",
    )  # fmt: skip
    axis.set(xlabel="epoch", ylabel="accuracy, %", ylim=(None, 100.4))
    other = axis.twinx()
    other.grid(False)
    steps, loss = _curve(rows, "loss")
    (grey,) = other.plot(steps, loss, color=GREY, linewidth=1.6, label="loss (right)")
    other.set_ylabel("loss")
    other.set_ylim(0, None)
    other.spines["right"].set_visible(True)
    # Accuracy rises and the loss stays above zero: that corner is the emptiest.
    other.legend(
        handles=[line, dots, grey], loc="lower right", frameon=True, framealpha=0.8,
        edgecolor="none",
    )  # fmt: skip


def _metatuning(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("2  Meta-tuning: episode accuracy")
    steps, accuracy = _curve(rows, "accuracy")
    axis.plot(steps, _percent(accuracy), color=BLUE, label="training episodes, gate sampled")
    steps, held_out = _curve(rows, "monitor_accuracy")
    axis.plot(
        steps, _percent(held_out), "o-", color=GREEN, markersize=4, linewidth=1.4,
        label="validation images, gate at its mean",
    )  # fmt: skip
    axis.set(xlabel="epoch", ylabel="accuracy, %", ylim=(None, 100.4))
    axis.legend(loc="best")


def _layer_curves(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[Any]]:
    steps, values = _curve(rows, key)
    return steps, list(zip(*values, strict=True))  # one sequence per layer


def _rewards(axis: Any, rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> None:
    axis.set_title("3  Reward of the gate, by gated layer")
    steps, rewards = _layer_curves(rows, "reward")
    _, baselines = _layer_curves(rows, "baseline")
    for layer, colour, reward, baseline in zip(layers, cycle(_LAYER_COLOURS), rewards, baselines):
        axis.plot(steps, reward, color=colour, label=layer)
        axis.plot(steps, baseline, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axis.plot([], [], color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label="baseline")
    axis.set(xlabel="epoch", ylabel="reward")
    if len(layers) <= _FEW_LAYERS:  # more have the colours of the next panel, and no room here
        axis.legend(loc="lower right")


def _gates(axis: Any, rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> None:
    axis.set_title("4  Gate α over time: mean and spread")
    steps, means = _layer_curves(rows, "alpha_mean")
    _, spreads = _layer_curves(rows, "alpha_std")
    for layer, colour, mean, spread in zip(layers, cycle(_LAYER_COLOURS), means, spreads):
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axis.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
        axis.plot(steps, mean, color=colour, label=layer)
    axis.axhline(0.5, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    axis.set(xlabel="epoch", ylabel="α", ylim=(0, 1))
    axis.text(
        0.99, 0.97, "↑ text asks the image", transform=axis.transAxes, ha="right", va="top",
        color=MUTED, fontsize=9,
    )  # fmt: skip
    axis.text(
        0.99, 0.03, "↓ text attends to itself", transform=axis.transAxes, ha="right",
        va="bottom", color=MUTED, fontsize=9,
    )  # fmt: skip
    columns = 1 if len(layers) <= _FEW_LAYERS else 2
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 0.06), ncols=columns)


def _results(axis: Any, results: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    axis.set_title("5  Novel classes, same episodes for all", pad=24)
    main = results[0]["method"]  # reads best at the bottom
    names = sorted(results[0]["methods"], key=lambda name: name == main)
    marks = ("o", "s", "D", "^")
    for index, result in enumerate(results):
        offset = 0.13 * (index - (len(results) - 1) / 2)
        for row, name in enumerate(names):
            value = result["methods"][name]
            colour = ORANGE if name == main else GREY
            x, y = 100 * value["accuracy"], len(names) - 1 - row - offset
            axis.errorbar(
                x, y, xerr=100 * (value["ci95"] or 0.0), fmt=marks[index % 4], color=colour,
                markersize=6, capsize=3, linewidth=1.6,
                label=f"{result['shot']}-shot" if row == 0 else None,
            )  # fmt: skip
            axis.annotate(
                f"{x:.1f}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center",
                fontsize=8.5, color=INK if name == main else MUTED,
            )  # fmt: skip
    axis.set_yticks(range(len(names)), [_wrap(labels.get(name, name)) for name in names][::-1])
    axis.tick_params(axis="y", length=0)
    axis.set(xlabel="accuracy, %", ylim=(-0.5, len(names) - 0.35))
    axis.margins(x=0.12)
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=len(results))


def _wrap(label: str) -> str:
    return (
        label.replace(" prototypes, before ", ",\nbefore\n")
        .replace(", ", ",\n")
        .replace("visual prototypes", "visual\nprototypes")
    )


def _samples(figure: Any, box: Any, samples: Samples) -> None:
    """Draw the samples inside ``box``, a row for what each of their classes is to the training."""
    pad = 0.012
    figure.text(
        box.x0, box.y1 + 0.0135, "6  What it sees", fontsize=11, fontweight="bold", va="bottom"
    )
    width = (box.width - 4 * pad) / 5
    height = width * figure.get_figwidth() / figure.get_figheight()
    for row, (caption, pictures) in enumerate(samples.items()):
        top = box.y1 - row * (height + 0.105) - 0.028
        figure.text(
            box.x0, top + 0.006, caption, fontsize=9.5, color=(MUTED, ORANGE)[row], va="bottom"
        )
        for column, (name, picture) in enumerate(pictures.items()):
            axis = figure.add_axes((box.x0 + column * (width + pad), top - height, width, height))
            axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set(visible=True, color=GRID)
            lines = textwrap.wrap(name, _SAMPLE, max_lines=2, placeholder="…")
            axis.set_xlabel("\n".join(map(plain, lines)), fontsize=9, labelpad=3)
