"""A table of evaluations for a paper: CSV, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dvla_fast.engine.settings import UsageError
from dvla_fast.report.collect import Run
from dvla_fast.report.seeds import Found, accuracies_of, origins_of, recipe_groups
from dvla_fast.statistics import checkpoint_interval, lineage_note, points, shared_note

_EPISODES = "1.96·s/√n over the episodes"
_TRAININGS = "the 95 % t interval over the trainings"
_PLUS_MINUS = r" $\pm$ "


@dataclass(frozen=True)
class Row:
    """One method on one list of episodes; accuracy and its half width are shares."""

    runs: str
    method: str
    dataset: str
    split: str
    way: int
    shot: int
    episodes: int
    trainings: int
    accuracy: float
    half: float | None
    notes: tuple[str, ...] = ()
    """What the half width does not speak of."""

    @property
    def interval(self) -> str:
        """Of what the half width speaks."""
        return _TRAININGS if self.trainings > 1 else _EPISODES

    @property
    def column(self) -> str:
        """Heading of the column that holds this row's figure."""
        place = self.dataset if self.split == "novel" else f"{self.dataset}/{self.split}"
        return f"{place}, {self.way}-way {self.shot}-shot"


def table_rows(runs: Sequence[Run]) -> list[Row]:
    """Every method of every evaluation; trainings of one recipe on the same episodes are one row.

    Raises:
        MissingDependencyError: several trainings, and SciPy is not installed.
    """
    return [
        _row(group, method)
        for group in recipe_groups(runs)
        for method in dict.fromkeys((group[0][1]["method"], *group[0][1]["methods"]))
        if all(method in (result["method"], *result["methods"]) for _, result in group)
    ]


def _row(group: Sequence[Found], method: str) -> Row:
    first = group[0][1]
    accuracies = accuracies_of(group, method)
    mine = first if method == first["method"] else first["methods"][method]
    accuracy, half = accuracies[0], mine["ci95"]
    notes: list[str] = []
    if len(accuracies) > 1:
        over = checkpoint_interval(accuracies)
        accuracy, half = over["accuracy"], over["ci95"]
        if shared_note(method, accuracies):  # a spread of 0 that nobody should print
            half = None
            notes.append("n/a: these trainings have the same accuracy")
        elif note := lineage_note("", origins_of(group)):
            notes.append(note)
    return Row(
        ", ".join(run.name for run, _ in group),
        method,
        group[0][0].dataset,
        str(first.get("split", "novel")),
        int(first["way"]),
        int(first["shot"]),
        int(first["episodes"]),
        len(accuracies),
        accuracy,
        half,
        tuple(notes),
    )


def as_csv(rows: Sequence[Row]) -> str:
    """One line a method and list of episodes, in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["runs", "method", "dataset", "split", "way", "shot", "episodes", "trainings", "accuracy",
         "half_width", "interval"]
    )  # fmt: skip
    for row in rows:
        half = "" if row.half is None else f"{100 * row.half:.4f}"
        writer.writerow(
            [row.runs, row.method, row.dataset, row.split, row.way, row.shot, row.episodes,
             row.trainings, f"{100 * row.accuracy:.4f}", half,
             "; ".join((row.interval, *row.notes))]
        )  # fmt: skip
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """A line a method, a column for each data set and number of supports."""
    head, body = _pivot(rows, " ± ")
    lines = [_markdown_line(head), _markdown_line(["---"] * len(head))]
    lines += map(_markdown_line, body)
    return "\n".join([*lines, "", f"{_legend(rows)}", ""])


def as_latex(rows: Sequence[Row]) -> str:
    """The same as a ``tabular`` with the rules of the package booktabs."""
    head, body = _pivot(rows, _PLUS_MINUS)
    lines = [
        f"% {_legend(rows)}",
        f"\\begin{{tabular}}{{ll{'c' * (len(head) - 2)}}}",
        r"\toprule",
        _latex_line(head),
        r"\midrule",
        *map(_latex_line, body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _pivot(rows: Sequence[Row], sign: str) -> tuple[list[str], list[list[str]]]:
    columns = list(dict.fromkeys(row.column for row in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cell = f"{points(row.accuracy)}{sign}{points(row.half)}"
        lines.setdefault((row.runs, row.method), {})[row.column] = cell
    body = [[*key, *(cells.get(name, "") for name in columns)] for key, cells in lines.items()]
    return ["runs", "method", *columns], body


def _legend(rows: Sequence[Row]) -> str:
    counts = " or ".join(dict.fromkeys(f"{row.episodes:,}" for row in rows))
    said = [f"Accuracy in percent over {counts} episode{'' if counts == '1' else 's'}"]
    if any(row.trainings == 1 for row in rows):
        said.append(f"± {_EPISODES}")
    if any(row.trainings > 1 for row in rows):
        several = (str(row.trainings) for row in rows if row.trainings > 1)
        numbers = " or ".join(dict.fromkeys(several))
        other = ", where there are several" if any(row.trainings == 1 for row in rows) else ""
        said.append(f"± {_TRAININGS} ({numbers}){other}")
    said += dict.fromkeys(note for row in rows for note in row.notes)
    return "; ".join(said) + "."


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    }
)  # fmt: skip


def _latex_line(cells: Sequence[str]) -> str:
    """Our plus-minus is the only formula; the rest is other people's names."""
    escaped = (_PLUS_MINUS.join(x.translate(_LATEX) for x in c.split(_PLUS_MINUS)) for c in cells)
    return " & ".join(escaped) + r" \\"


_FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    ".csv": as_csv,
    ".md": as_markdown,
    ".tex": as_latex,
}


def table_format(path: Path) -> Callable[[Sequence[Row]], str]:
    """Return what lays out a table for a file of this name.

    Raises:
        UsageError: another ending than .csv, .md and .tex.
    """
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        endings = ", ".join(_FORMATS)
        raise UsageError(f"report: --table {path}: expected a name that ends in {endings}")
    return found
