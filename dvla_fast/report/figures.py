"""The report's charts of results, training and policy: from a run's rows to captioned figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dvla_fast.report.collect import Run
from dvla_fast.report.published import published_for
from dvla_fast.report.seeds import over_checkpoints
from dvla_fast.report.svg import (
    Interval,
    Line,
    Mark,
    colour,
    heatmap,
    interval_chart,
    line_chart,
    scatter,
)
from dvla_fast.statistics import class_accuracies, confusion, mean_interval, p_text

_MOST_POINTS = 600  # of a scatter chart
_MOST_CLASSES = 40  # of a chart by class


@dataclass
class Figure:
    """A captioned chart; ``legend``: (name, class of its key)."""

    title: str
    svg: str
    caption: str
    legend: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Part:
    """Figures under one heading, with sentences before them."""

    title: str
    figures: list[Figure]
    lines: list[str] = field(default_factory=list)


def episode_title(result: dict[str, Any]) -> str:
    """Name what a result was measured on."""
    return (
        f"{result.get('dataset', 'unknown data')}, {result.get('split', '?')} classes, "
        f"{result.get('way', '?')}-way {result.get('shot', '?')}-shot"
    )


def accuracy_parts(runs: Sequence[Run]) -> list[Part]:
    """Accuracies with intervals, one part for each kind of episodes, published numbers beside."""
    groups: dict[tuple[Any, ...], list[tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        for result in run.results:
            if "methods" in result:
                # two folders of one name are two data sets
                images = (result.get("split_sha256"), result.get("images_sha256"))
                groups.setdefault((episode_title(result), *images), []).append((run, result))
    titles = [title for title, *_ in groups]
    parts = []
    for (title, *_), found in groups.items():
        if titles.count(title) > 1:
            title += f", images of {', '.join(run.name for run, _ in found)}"
        parts.append(_accuracy_part(title, found))
    return parts


def _accuracy_part(title: str, found: Sequence[tuple[Run, dict[str, Any]]]) -> Part:
    rows, gaps = [], []
    several = len(found) > 1
    for run, result in found:
        before = f"{run.name}: " if several else ""
        main = result.get("method", "")
        # the main method last: it reads best just above what it is compared with
        for name in sorted(result["methods"], key=lambda method: method == main):
            value = result["methods"][name]
            shown = _method(name, result)
            rows.append(
                Interval(
                    before + shown, 100 * value["accuracy"], _percent(value.get("ci95")),
                    0 if name == main else -1,
                )
            )  # fmt: skip
        for pair, value in result.get("paired", {}).items():
            other = pair.split(" - ", 1)[-1]
            label = f"{before}{main} − {_method(other, result)}"
            half, p = _percent(value.get("ci95")), p_text(value.get("p_value"))
            gaps.append(Interval(label, 100 * value["difference"], half, 1, aside=p))
    # trained on other data sets, results of the same episodes have other columns
    columns = dict(filter(all, (published_for(result) for _, result in found)))
    for column, entries in columns.items():
        of = f" ({column})" if len(columns) > 1 else ""
        rows += [Interval(f"published: {e.source}{of}", e.accuracy, e.half, 4) for e in entries]
    episodes = " or ".join(dict.fromkeys(f"{result['episodes']:,}" for _, result in found))
    caption = (
        f"Accuracy in percent over {episodes} episodes, with the 95 % interval of the mean. "
        "Blue: the main method; grey: what it is compared with on the same episodes."
    )
    if columns:
        caption += (
            f" Ochre: numbers of other people for {', '.join(columns)}, quoted as theirs from "
            "their papers; backbone, pre-training, texts and splits differ, so the comparison is "
            "loose."
        )
    else:
        caption += " No published numbers are known for these episodes."
    figures = [Figure("Accuracy", interval_chart(rows, "accuracy, %"), caption)]
    if gaps:
        figures.append(
            Figure(
                "Paired differences",
                interval_chart(gaps, "difference, points", _around_zero(gaps), 2, 0.0, True),
                "Difference in percentage points, taken episode by episode, with its 95 % "
                "interval: an interval that holds 0 shows no difference. It speaks of more "
                "episodes with these weights, not of training again.",
            )
        )
    return Part(title, figures, [over_checkpoints(run, result) for run, result in found])


def _method(name: str, result: dict[str, Any]) -> str:
    if name == "fixed gate" and "fixed_alpha" in result:
        return f"{name} (α = {result['fixed_alpha']:g})"
    return name


def _percent(value: Any) -> float | None:
    return 100 * value if isinstance(value, int | float) and math.isfinite(value) else None


def _around_zero(rows: Sequence[Interval]) -> tuple[float, float]:
    reach = max(abs(row.value) + (row.half or 0) for row in rows) * 1.15 or 1.0
    return -reach, reach


def training_figures(runs: Sequence[Run]) -> list[Figure]:
    """Loss and accuracy over the epochs of both stages; runs share a chart."""
    figures = []
    for stage, words in (("pretrain", "Pre-training"), ("metatune", "Meta-tuning")):
        shown = [run for run in runs if run.metrics.get(stage)]
        if not shown:
            continue
        held = "monitor_episode_accuracy" if stage == "pretrain" else "monitor_accuracy"
        loss = _curves(shown, stage, [("loss", "loss", False)])
        if stage == "metatune":
            loss += _curves(shown, stage, [("supervised", "classification part", True)], -1)
        accuracy = _curves(
            shown, stage, [("accuracy", "training", False), (held, "validation", True)], scale=100
        )
        what = (
            "share of training images, augmented, that were classified right, and 1-shot accuracy "
            "on validation images"
            if stage == "pretrain"
            else "accuracy on training episodes with drawn gates, and on validation images with "
            "the gates at their mean"
        )
        figures += [
            _lines_figure(f"{words}: loss", loss, "loss", "Mean over the steps of an epoch."),
            _lines_figure(
                f"{words}: accuracy",
                accuracy,
                "accuracy, %",
                f"The {what}. Checkpoints are chosen by the validation curve; no novel class "
                "is read.",
            ),
        ]
    return [figure for figure in figures if figure is not None]


def _curves(
    runs: Sequence[Run],
    stage: str,
    keys: Sequence[tuple[str, str, bool]],
    shift: int = 0,
    scale: float = 1.0,
) -> list[Line]:
    """A line for each run and key; keys are (name in the rows, words, drawn with dots)."""
    lines = []
    for place, run in enumerate(runs):
        for number, (key, words, dots) in enumerate(keys):
            points = [(row["step"], scale * row[key]) for row in run.metrics[stage] if key in row]
            if not points:
                continue
            name = f"{run.name}: {words}" if len(runs) > 1 else words
            index = place if len(runs) > 1 else (-1 if shift < 0 else number * 2)
            lines.append(
                Line(
                    name,
                    points,
                    index,
                    dashed=dots and len(runs) > 1,
                    dots=dots and len(points) < 60,
                )
            )
    return lines


def _lines_figure(
    title: str,
    lines: Sequence[Line],
    y_label: str,
    caption: str,
    y_range: tuple[float, float] | None = None,
    guide: float | None = None,
) -> Figure | None:
    if not lines:
        return None
    legend = [(line.name, _key(line)) for line in lines]
    svg = line_chart(lines, "epoch", y_label, y_range, guide)
    return Figure(title, svg, caption, legend)


def _key(line: Line) -> str:
    style = " dashed" if line.dashed else " dotted" if line.dots else ""
    return colour(line.colour) + style


def layer_lines(
    run: Run, key: str, dashed: bool = False, spread: str = "", name: str = ""
) -> list[Line]:
    """A line for each gated layer of a figure that meta-tuning logs; ``spread``: its deviation."""
    rows = [row for row in run.metrics.get("metatune", []) if key in row]
    if not rows:
        return []
    if not isinstance(rows[0][key], list):
        return [Line(name or "all layers", [(row["step"], row[key]) for row in rows], 0, dashed)]
    lines = []
    for index, layer in enumerate(run.layers):
        good = [row for row in rows if index < len(row[key])]
        points = [(row["step"], row[key][index]) for row in good]
        band = [
            (
                row["step"],
                row[key][index] - row[spread][index],
                row[key][index] + row[spread][index],
            )
            for row in good
            if index < len(row.get(spread, ()))
        ]
        lines.append(Line(layer + name, points, index, dashed, band=band))
    return lines


def gate_figures(run: Run) -> list[Figure]:
    """Gates over training, by class and by episode."""
    lines = layer_lines(run, "alpha_mean", spread="alpha_std")
    held = [
        Line(f"{line.name}, validation", line.points, line.colour, dots=True)
        for line in layer_lines(run, "monitor_alpha")
    ]
    figures = [
        _lines_figure(
            "Gate α over training",
            [*lines, *held],
            "α",
            "Mean α of each gated layer (line) and its deviation over the epoch's episodes "
            "(shade); dots: the policy's mean on validation images. Near 1 the text asks the "
            "image, near 0 it attends to itself.",
            (0.0, 1.0),
            0.5,
        )
    ]
    for shot, record in run.records.items():
        if record.alphas is not None:
            figures += _recorded_gates(run, shot)
    return [figure for figure in figures if figure is not None]


def _recorded_gates(run: Run, shot: int) -> list[Figure]:
    record, names = run.records[shot], run.class_names[shot]
    assert record.alphas is not None
    alphas = record.alphas.mean(0)  # [n, L], over checkpoints
    method = (run.result(shot) or {}).get("method") or next(iter(record.predictions))
    accuracies = record.accuracies(method)
    step = -(-len(alphas) // _MOST_POINTS)
    thinned = f" Every {step}th episode is drawn." if step > 1 else ""
    figures, by_class = [], []
    for index in range(alphas.shape[1]):
        layer = run.layers[index] if index < len(run.layers) else f"gated layer {index + 1}"
        values = alphas[:, index]
        points = [(float(a), 100 * float(b)) for a, b in zip(values[::step], accuracies[::step])]
        spread = float(values.std(unbiased=False))
        figures.append(
            Figure(
                f"α by episode, {shot}-shot, {layer}",
                scatter(
                    [Mark(layer, points, index)], "α", "accuracy of the episode, %", (0.0, 1.0)
                ),
                f"One point an evaluation episode; α is {float(values.mean()):.3f} on average with "
                f"a deviation of {spread:.3f}. A narrow column means that the gate hardly reacts "
                f"to the episode; a slope, that it goes with how hard it is.{thinned}",
            )
        )
        if record.classes.shape[1] < len(names):
            by_class.append(_gates_by_class(record.classes, values, names, index, shot, layer))
    return figures + by_class


def _gates_by_class(
    classes: Any, values: Any, names: Sequence[str], index: int, shot: int, layer: str
) -> Figure:
    rows = []
    for label, name in enumerate(names):
        mine = values[(classes == label).any(1)]
        if len(mine):
            mean, half = mean_interval(mine)
            rows.append(Interval(name, mean, half, index))
    rows.sort(key=lambda row: -row.value)
    dropped = max(0, len(rows) - _MOST_CLASSES)
    note = f" The {dropped} classes with the smallest α are left out." if dropped else ""
    return Figure(
        f"α by class, {shot}-shot, {layer}",
        interval_chart(rows[:_MOST_CLASSES], "mean α", digits=3),
        "Mean α over the episodes that hold the class, with its 95 % interval; the axis covers the "
        "values only. An episode counts with its mean α, so a class shares it with those that it "
        f"met.{note}",
    )


_POLICY: tuple[tuple[str, str, str, str], ...] = (
    ("entropy", "Entropy of the policy", "nats",
     "Falling entropy means that the policy settles; a sudden drop, that it stops exploring."),
    ("gradient_variance", "Variance of the policy gradient", "variance",
     "Of the terms whose mean is a step's policy gradient; what a baseline is there to lower."),
    ("policy_kl", "Movement of the policy", "KL, nats",
     "Mean divergence between the policy before and after a step, over the states that it met."),
    ("clip_fraction", "Clipped ratios", "share",
     "Share of probability ratios outside the clip range at the last update."),
    ("kl_reference", "Distance from the reference policy", "KL, nats",
     "Divergence from the frozen reference gate."),
    ("value_error", "Error of the value network", "squared error",
     "How far the learned baseline is from the rewards."),
    ("preference_accuracy", "Preferences", "share",
     "Share of pairs in which the policy prefers the better draw."),
    ("alignment", "Alignment loss", "loss",
     "1 − cosine of the projected fused tokens and the class's text, which trains U alone."),
)  # fmt: skip


def policy_figures(run: Run) -> list[Figure]:
    """Rewards, advantages, entropy and whatever else the objective logs."""
    found: list[Figure | None] = [
        _lines_figure(
            "Reward",
            [*layer_lines(run, "reward"), *layer_lines(run, "baseline", True, name=", baseline")],
            "reward",
            "Mean weighted reward of each gated layer; dashed: the baseline that is subtracted.",
        ),
        _reward_parts(run),
        _lines_figure(
            "Advantage",
            layer_lines(run, "advantage_mean", spread="advantage_std"),
            "advantage",
            "Reward minus baseline, mean and deviation over a step's episodes. It should hover "
            "around 0: a lasting offset is a baseline that lags behind.",
            guide=0.0,
        ),
        _lines_figure(
            "Extremes of the advantage",
            [*layer_lines(run, "advantage_max"), *layer_lines(run, "advantage_min", True)],
            "advantage",
            "Largest (line) and smallest (dashed) advantage of a step, averaged over the epoch.",
            guide=0.0,
        ),
    ]
    for key, title, unit, caption in _POLICY:
        found.append(_lines_figure(title, layer_lines(run, key), unit, caption))
    return [figure for figure in found if figure is not None]


def _reward_parts(run: Run) -> Figure | None:
    rows = run.metrics.get("metatune", [])
    keys = [key for key in (rows[0] if rows else ()) if key.startswith("reward_")]
    lines: list[Line] = []
    for number, key in enumerate(keys):
        words = key.removeprefix("reward_").replace("_", " ")
        lines += [
            replace(line, colour=line.colour + 2 * (number // 2))
            for line in layer_lines(run, key, dashed=number % 2 == 1, name=f", {words}")
        ]
    return _lines_figure(
        "Parts of the reward", lines, "before weighting",
        "Each named reward before its weight, by gated layer.",
    )  # fmt: skip


def collapse_line(run: Run) -> str:
    """Say whether a layer's policy stopped exploring."""
    layers = run.layers
    gone = sorted({i for row in run.metrics.get("metatune", []) for i in row.get("collapsed", [])})
    if not run.metrics.get("metatune"):
        return ""
    if not gone:
        return "No layer's policy collapsed (α stayed away from 0 and 1)."
    named = ", ".join(layers[i] if i < len(layers) else str(i) for i in gone)
    return f"The policy collapsed at {named}: it draws the same gate every time and learns no more."


def class_figures(run: Run, shot: int) -> list[Figure]:
    """Accuracy by class, and who is taken for whom."""
    record, names = run.records[shot], run.class_names[shot]
    result = run.result(shot) or {}
    method = result.get("method") or next(iter(record.predictions))
    given = (record.classes, record.labels, record.predictions[method], len(names))
    rows = [
        Interval(name, 100 * row["accuracy"],
                 _percent(row["ci95"]), 0, f", {row['episodes']:,} episodes")
        for name, row in zip(names, class_accuracies(*given))
        if row["accuracy"] is not None
    ]  # fmt: skip
    rows.sort(key=lambda row: -row.value)
    dropped = len(rows) - _MOST_CLASSES
    if dropped > 0:
        rows = [*rows[: _MOST_CLASSES // 2], *rows[-_MOST_CLASSES // 2 :]]
    left_out = f" {dropped} classes in the middle are left out." if dropped > 0 else ""
    rates = confusion(*given).rates
    kept = _most_confused(rates, names)
    shown = rates[kept][:, kept].tolist()
    chosen = [names[index] for index in kept]
    partly = "" if len(kept) == len(names) else f" The {len(kept)} most confused classes."
    return [
        Figure(
            f"Accuracy by class, {shot}-shot, {method}",
            interval_chart(rows, "accuracy, %"),
            "Share of a class's queries that were right, mean over the episodes that hold it, with "
            f"its 95 % interval.{left_out}",
        ),
        Figure(
            f"Confusion, {shot}-shot, {method}",
            heatmap(shown, chosen, f"Confusion of {len(chosen)} classes, rows are the truth."),
            "Row: the true class; column: the answer. Percent of the row's queries, of the times "
            f"that the column was a choice. Blue on the diagonal is right.{partly}",
        ),
    ]


def _most_confused(rates: Any, names: Sequence[str]) -> list[int]:
    if len(names) <= _MOST_CLASSES:
        return list(range(len(names)))
    off = rates.nan_to_num(0).clone()
    off.fill_diagonal_(0)
    return sorted((off.amax(1) + off.amax(0)).argsort(descending=True)[:_MOST_CLASSES].tolist())


def feature_figures(
    points: Sequence[Sequence[tuple[float, float]] | None],
    labels: Sequence[int],
    supports: int,
    answers: Sequence[int],
    names: Sequence[str],
    captions: tuple[str, str],
) -> list[Figure]:
    """t-SNE before and after fusion; ``points`` are all images' places in both."""
    figures = []
    legend = [(name, f"key {colour(index)}") for index, name in enumerate(names)]
    for places, caption, when in zip(points, captions, ("before fusion", "after fusion")):
        if places is None:
            return []
        marks = []
        for label, name in enumerate(names):
            mine = [i for i, value in enumerate(labels) if value == label]
            right = [i for i in mine if i >= supports and answers[i - supports] == label]
            wrong = [i for i in mine if i >= supports and answers[i - supports] != label]
            for kind, chosen in (("dot", right), ("cross", wrong)):
                marks.append(Mark(name, [places[i] for i in chosen], label, kind))
        for label, name in enumerate(names):  # on top
            mine = [i for i in range(supports) if labels[i] == label]
            marks.append(Mark(name, [places[i] for i in mine], label, "star"))
        figures.append(
            Figure(
                f"Features {when}",
                scatter(marks, alt=f"t-SNE of {len(labels)} images' features {when}, by class."),
                caption,
                legend,
            )
        )
    return figures
