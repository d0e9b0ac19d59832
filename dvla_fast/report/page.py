"""``dvla-fast report``: one self-contained HTML page about one or more runs.

The page holds everything it shows: style, script, charts as SVG and pictures as data URLs. Its
content policy forbids the browser any other address.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvla_fast.engine.build import pick_device
from dvla_fast.engine.compare import compare_groups, verdict
from dvla_fast.engine.settings import UsageError, checked
from dvla_fast.engine.tool_config import ReportRun
from dvla_fast.errors import DVLAError, MissingDependencyError, OutputError
from dvla_fast.files import check_new, check_writable, write_text_atomic
from dvla_fast.report.collect import Run, read_runs
from dvla_fast.report.figures import (
    Part,
    accuracy_parts,
    class_figures,
    collapse_line,
    feature_figures,
    gate_figures,
    policy_figures,
    training_figures,
)
from dvla_fast.report.scenes import Pictures, collect_pictures
from dvla_fast.report.seeds import over_runs, recipe_groups
from dvla_fast.report.table import table_format, table_rows

_ASSETS = Path(__file__).parent / "assets"


@dataclass
class Section:
    """A heading of the page: figures in parts, or a template of its own (``kind``)."""

    anchor: str
    title: str
    lead: str
    parts: list[Part] = field(default_factory=list)
    kind: str = "figures"
    missing: str = ""


@dataclass
class Written:
    """What :func:`run_report` did."""

    path: Path
    bytes: int
    seconds: float
    notes: list[str]


def run_report(config: ReportRun, *, quiet: bool = False) -> Written:
    """Do what ``dvla-fast report`` does.

    Raises:
        UsageError: no run given.
        OutputError: no folder holds a run, or the page cannot be written.
    """
    from dvla_fast.engine.progress import Progress

    started, config = time.monotonic(), checked(config)
    if not config.runs:
        raise UsageError("report needs run folders: dvla-fast report runs/result")
    if any(number < 0 for number in config.episodes):
        raise UsageError(f"report: episodes are numbered from 0, got {config.episodes}")
    output = Path(config.output)
    if os.path.isdir(output):
        raise OutputError(f"{output}: is a folder; give --output the name of an HTML file")
    check_new(output, config.overwrite)
    check_writable(output)
    table = Path(config.table) if config.table else None
    if table is not None:
        layout = table_format(table)
        if table.resolve() == output.resolve():
            raise UsageError(f"report: {table} cannot be both the page and the table")
        check_new(table, config.overwrite, "--table")
        check_writable(table, "give --table a file in a folder that you may write to")
    if not config.text_only:
        pick_device(config.device)  # an unknown one is no fault of a run
    environment = _environment()
    with Progress({"report": 1.0}, enabled=not quiet) as progress:
        progress.begin("report", 4)
        runs, notes = read_runs(config.runs)
        rows = table_rows(runs) if table is not None else []
        if table is not None and not rows:
            raise OutputError(f"{table}: none of the runs holds a finished evaluation")
        progress.advance()
        pictures, missing = None, ["Features, attention and texts were left out (--text_only)."]
        if not config.text_only:
            pictures, missing = collect_pictures(runs, config)
        progress.advance(2)
        notes += missing
        if pictures is not None:
            notes += [f"{pictures.run}: {note}" for note in pictures.notes]
        html = render(environment, runs, pictures, notes, config.title)
        write_text_atomic(output, html)
        if table is not None:
            write_text_atomic(table, layout(rows))
        progress.advance()
    size = len(html.encode("utf-8"))
    return Written(output, size, time.monotonic() - started, notes)


def render(
    environment: Any, runs: Sequence[Run], pictures: Pictures | None, notes: list[str], title: str
) -> str:
    """Return the page."""
    from dvla_fast import __version__

    datasets = list(dict.fromkeys(run.dataset for run in runs if run.dataset))
    page: str = environment.get_template("page.html.j2").render(
        title=title or f"Report: {', '.join(datasets) or 'runs'}",
        headline=_headline(runs),
        runs=runs,
        notes=notes,
        sections=_sections(runs, pictures),
        pictures=pictures,
        embeddings=_embeddings(pictures),
        version=__version__,
        date=time.strftime("%Y-%m-%d"),
        css=(_ASSETS / "page.css").read_text("utf-8"),
        js=(_ASSETS / "page.js").read_text("utf-8"),
    )
    return page


def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:  # comes with torch; a trimmed installation may lack it
        raise MissingDependencyError(
            "the report needs Jinja2, which is not installed; run pip install jinja2"
        ) from error
    return Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,  # class names, paths and texts are other people's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _headline(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The main accuracies, as big numbers."""
    shown = []
    several = len({run.dataset for run in runs if run.results}) > 1
    for run in runs:
        for result in run.results:
            if "accuracy" not in result:
                continue
            shown.append(
                {
                    "value": f"{100 * result['accuracy']:.1f}",
                    "half": f"{100 * result['ci95']:.1f}"
                    if result.get("ci95") is not None
                    else "?",
                    "what": (f"{run.dataset}, " if several else "")
                    + f"{result.get('way')}-way {result.get('shot')}-shot"
                    + ("" if _split(result) == "novel" else f", split {_split(result)}"),
                    "who": f"{result.get('method')}, {run.name}",
                }
            )
    return shown[:6]


def _sections(runs: Sequence[Run], pictures: Pictures | None) -> list[Section]:
    nothing = "None of the runs holds this."
    results = Section(
        "accuracy", "Accuracy",
        f"How often queries of {_whose_queries(runs)} got the right class.",
        accuracy_parts(runs), missing="No run has a finished evaluation.",
    )  # fmt: skip
    between = _between(runs)
    if between.lines:
        results.parts.append(between)
    training = Section(
        "training", "Training", "Loss and accuracy over the epochs.", missing=nothing
    )
    figures = training_figures(runs)
    if figures:
        training.parts.append(Part("", figures))
    gates = Section(
        "gates", "Gates",
        "α, the share that each gated layer gives to the image when text asks: over training, by "
        "class and by episode.",
        missing=nothing,
    )  # fmt: skip
    policy = Section(
        "policy", "Policy",
        "What the gates were rewarded for, and how their policy moved. Averages over an epoch.",
        missing="No run of meta-tuning was given: it logs rewards, advantages and entropy.",
    )  # fmt: skip
    classes = Section("classes", "Classes", "Where the errors are.", missing=nothing)
    many = len(runs) > 1
    for run in runs:
        name = run.name if many else ""
        if found := gate_figures(run):
            gates.parts.append(Part(name, found))
        if found := policy_figures(run):
            policy.parts.append(Part(name, found, [collapse_line(run)]))
        for shot, record in run.records.items():
            if not gates.parts:
                break
            if record.alphas is not None and record.classes.shape[1] == len(run.class_names[shot]):
                gates.parts[-1].lines = [
                    "Every evaluation episode holds all classes, so α has no difference by class."
                ]
        if run.records:
            found = [figure for shot in run.records for figure in class_figures(run, shot)]
            classes.parts.append(Part(name, found))
    gone = "" if pictures else "See the notes at the top for what is missing."
    features = Section(
        "features", "Features",
        "Where an episode's images lie for the classifier, before and after text was mixed in.",
        kind="features", missing=gone,
    )  # fmt: skip
    episodes = Section(
        "episodes", "Episodes", "Single episodes: what the model answered, how far it let text ask "
        "the image, and where each text looked.", kind="episodes", missing=gone,
    )  # fmt: skip
    texts = Section(
        "texts", "Texts", "What the model was told about each class.", kind="texts", missing=gone
    )
    about = Section("runs", "Runs", "Where the numbers come from.", kind="runs")
    return [results, training, gates, policy, classes, features, episodes, texts, about]


# What the classes of a split are to the training on the same data set.
_SPLITS = {
    "novel": "classes that training never saw",
    "monitor": "the images by which checkpoints are selected (split monitor)",
    "base": "the classes that training works on (split base)",
}


def _split(result: dict[str, Any]) -> str:
    return str(result.get("split", "novel"))


def _whose_queries(runs: Sequence[Run]) -> str:
    """Say what classes the evaluations' queries are of."""
    found = []
    for result in (result for run in runs for result in run.results):
        split = _split(result)
        words = _SPLITS.get(split, f"split {split}")
        if split != "novel" and result.get("cross_domain"):
            words = f"the split {split} of another data set than the one trained on"
        found.append(words)
    return "; of ".join(dict.fromkeys(found)) or _SPLITS["novel"]


def _between(runs: Sequence[Run]) -> Part:
    """Trainings of one recipe together, and each evaluation against the first of its episodes."""
    part = Part("Between the runs", [])
    with suppress(MissingDependencyError):
        part.lines += over_runs(runs)
    able = [run for run in runs if run.results and run.records]
    seeds = [{run.name for run, _ in group} for group in recipe_groups(able)]
    for place, other in enumerate(able):
        for first in able[:place]:
            if any({first.name, other.name} <= names for names in seeds):
                continue  # neither is better: training again would turn them round
            try:
                with warnings.catch_warnings():  # of other pixels, which the notes tell
                    warnings.simplefilter("ignore", UserWarning)
                    compared = compare_groups([str(first.path)], [str(other.path)])
            except DVLAError:
                continue  # not comparable, or damaged: said among the notes, too
            part.lines += [
                f"{row['way']}-way {row['shot']}-shot: {verdict(row, (first.name, other.name))}."
                for row in compared["results"]
            ]
            break
    return part


_FUSED = {  # features after fusion, by text scope
    "episode": "The same images with the texts.",
    "class": "The same images, supports with the texts of their own class, queries as before.",
    "candidate": "The same images, supports with the texts of their own class, each query with "
    "those of the class that it was put into, which may be what draws it there.",
}


def _embeddings(pictures: Pictures | None) -> list[dict[str, Any]]:
    """The features' figures, episode by episode."""
    found: list[dict[str, Any]] = []
    if pictures is None:
        return found
    for scene in pictures.scenes:
        figures = feature_figures(
            (scene.before, scene.after), scene.labels, scene.supports, scene.answers, scene.names,
            ("The backbone alone.", _FUSED[pictures.text_scope]),
        )  # fmt: skip
        found.append({"scene": scene, "figures": figures})
    return found
