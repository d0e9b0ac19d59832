"""``dvla-fast predict``: a checkpoint learns classes from a few images and classifies files.

A thin layer over ``FewShotClassifier``: which files are read, which cannot be, and the table.
"""

from __future__ import annotations

import csv
import filecmp
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvla_fast.data.decode import decode, is_image
from dvla_fast.data.folders import class_folders
from dvla_fast.engine.classifier import FewShotClassifier
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.settings import UsageError, checked
from dvla_fast.engine.tool_config import PredictImages
from dvla_fast.errors import DataError, OutputError
from dvla_fast.files import check_new, check_writable, json_text, write_text_atomic
from dvla_fast.names import normalised_name


@dataclass(frozen=True)
class Answer:
    """What is said about one file.

    path: as given or found; label: its class, where it lies in a folder named like one, else "";
    support: whether the classes were learned from it, or from a copy; predicted: class, "" for a
    file that cannot be read; probabilities: of each class, in their order; error: why the file
    cannot be read, or "".
    """

    path: Path
    label: str = ""
    support: bool = False
    predicted: str = ""
    probabilities: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Answers:
    """Everything that :func:`run_predict` found out.

    answers: one for each file, in their order; class_names: in the order of probabilities;
    output: file written.
    """

    answers: list[Answer]
    class_names: tuple[str, ...]
    output: Path

    @property
    def unreadable(self) -> list[Answer]:
        """Files that cannot be read."""
        return [answer for answer in self.answers if answer.error]

    @property
    def labelled(self) -> list[Answer]:
        """Answers whose class is known and that are no supports: what accuracy is about."""
        return [x for x in self.answers if x.label and not x.error and not x.support]

    def text(self, rows: int) -> str:
        """Lay out the first rows, the number of images a class, and accuracy, for a terminal."""
        read = [answer for answer in self.answers if not answer.error]
        wide = max(len("path"), *(len(str(answer.path)) for answer in read[:rows] or read[:1]))
        name = max(len("predicted"), *map(len, self.class_names))
        lines = [f"{'path':<{wide}}  {'predicted':<{name}}  probability"] if rows else []
        lines += [
            f"{answer.path!s:<{wide}}  {answer.predicted:<{name}}  {max(answer.probabilities):.2f}"
            for answer in read[:rows]
        ]
        if rows and len(read) > rows:
            lines.append(f"... and {len(read) - rows} more")
        lines += ["", *self._counts(read, name), ""]
        if self.labelled:
            lines.append(self._accuracy())
        if self.unreadable:
            lines.append(f"unreadable  {len(self.unreadable)} of {len(self.answers)} files")
        lines.append(f"written     {self.output} ({len(self.answers)} rows)")
        return "\n".join(map(_printable, lines)).lstrip("\n")

    def _counts(self, read: Sequence[Answer], width: int) -> list[str]:
        known = self.labelled
        lines = [f"{'class':<{width}}  images{'  right' if known else ''}"]
        for name in self.class_names:
            line = f"{name:<{width}}  {sum(a.predicted == name for a in read):>6}"
            own = [answer for answer in known if answer.label == name]
            if own:
                line += f"  {sum(a.predicted == name for a in own)} of {len(own)}"
            lines.append(line)
        return lines

    def _accuracy(self) -> str:
        right = sum(answer.predicted == answer.label for answer in self.labelled)
        count = len(self.labelled)
        text = f"accuracy    {right / count:.1%} ({right} of {count} images in folders of a class"
        used = sum(answer.support for answer in self.answers)
        return text + (f"; {used} supports do not count)" if used else ")")

    def csv_text(self) -> str:
        """Return a table with a row for each file."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        shares = [f"probability_{name}" for name in self.class_names]
        writer.writerow(["path", "label", "support", "predicted", *shares, "error"])
        empty = [""] * len(shares)
        for item in self.answers:
            values = [f"{value:.6f}" for value in item.probabilities] or empty
            support = "yes" if item.support else ""
            writer.writerow([item.path, item.label, support, item.predicted, *values, item.error])
        # Names of files need not be text.
        return stream.getvalue().encode("utf-8", "replace").decode()

    def json_text(self, facts: dict[str, Any]) -> str:
        """Return the same as a JSON object, with what the answers come from."""
        images = [
            {
                "path": str(item.path),
                "label": item.label or None,
                "support": item.support,
                "predicted": item.predicted or None,
                "probabilities": dict(zip(self.class_names, item.probabilities)) or None,
                "error": item.error or None,
            }
            for item in self.answers
        ]
        return json_text({**facts, "classes": list(self.class_names), "images": images}, 2) + "\n"


def run_predict(config: PredictImages, *, quiet: bool = False) -> Answers:
    """Do what ``dvla-fast predict`` does.

    Raises:
        UsageError: a setting is missing or cannot mean anything.
        DataError: no images, none that can be read, or supports that are no classes.
        OutputError: the output cannot be written.
        CheckpointError, BankError: as ``FewShotClassifier``.
    """
    config = checked(config)
    output = _check(config)
    files = find_images(config.images)
    classifier = FewShotClassifier.load(config.checkpoint, config.device)
    classifier.learn(config.supports, config.bank or None, config.encoder)
    supports = _by_size(class_folders(Path(config.supports)).values())
    with Progress({"predict": 1.0}, enabled=not quiet) as progress:
        progress.begin("predict", len(files))
        answers = []
        for first in range(0, len(files), config.batch):
            answers += _answer(classifier, files[first : first + config.batch], supports)
            progress.advance(min(config.batch, len(files) - first))
    if all(answer.error for answer in answers):
        raise DataError(f"none of {len(answers)} files can be read; first: {answers[0].error}")
    found = Answers(answers, classifier.class_names, output)
    facts = {name: getattr(config, name) or None for name in ("checkpoint", "supports", "bank")}
    table = found.csv_text() if output.suffix == ".csv" else found.json_text(facts)
    write_text_atomic(output, table)
    return found


def _check(config: PredictImages) -> Path:
    """Check the settings before work starts; returns the file to write."""
    for name in ("images", "checkpoint", "supports"):
        if not getattr(config, name):
            raise UsageError(
                f"predict needs {'images' if name == 'images' else f'--{name}'}: dvla-fast predict "
                "IMAGES --checkpoint TUNED.safetensors --supports FOLDER --bank BANK.json"
            )
    if config.encoder and not config.bank:
        raise UsageError("--encoder: there are no texts to encode; give --bank too, or neither")
    output = Path(config.output)
    if output.suffix not in (".csv", ".json"):
        raise UsageError(
            f"--output {config.output!r}: the table is written as .csv or .json; name it so"
        )
    if os.path.isdir(output):
        raise OutputError(f"{output}: is a folder; give --output the name of a file")
    for path in (config.bank, *config.images):
        if os.path.exists(output) and os.path.exists(path) and output.samefile(path):
            raise UsageError(
                f"--output {output}: would take the place of what is read; name it anew"
            )
    check_new(output, config.overwrite)
    check_writable(output)
    return output


def find_images(given: Sequence[str]) -> list[Path]:
    """List image files: those named, and all below the folders named, in order.

    Raises:
        DataError: nothing there, or a folder without images.
    """
    files: dict[str, Path] = {}  # each once, in order
    for path in map(Path, given):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder of images")
        found = [path]
        if path.is_dir():
            found = sorted(_images_below(path, set()))
            if not found:
                raise DataError(f"{path}: no images in this folder or below")
        for item in found:
            files.setdefault(os.path.abspath(item), item)
    return list(files.values())


def _images_below(folder: Path, entered: set[str]) -> Iterator[Path]:
    """Image files of a folder and of those in it, links included; each folder once.

    Raises:
        DataError: a folder that cannot be read.
    """
    if (real := os.path.realpath(folder)) in entered:
        return
    entered.add(real)
    try:
        # a folder rather than a link to it, whatever the order on disk
        items = sorted(folder.iterdir(), key=lambda item: (item.is_symlink(), item))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    for item in items:
        if item.name.startswith("."):
            continue
        if item.is_dir():
            yield from _images_below(item, entered)
        elif is_image(item):
            yield item


def _answer(
    classifier: FewShotClassifier, files: Sequence[Path], supports: Mapping[int, Sequence[Path]]
) -> list[Answer]:
    """Classify files; one that cannot be read changes nothing for the others."""
    opened = [_opened(path, classifier.image_size) for path in files]
    images = [image for image, _ in opened if image is not None]
    rows: list[Any] = []
    if images:
        result = classifier.classify(images, len(images))
        rows = list(zip(result.predicted, result.probabilities.tolist()))
    answers = []
    for path, (_, error) in zip(files, opened):
        label = _label(path, classifier.class_names)
        if error:
            answers.append(Answer(path, label, error=error))
            continue
        predicted, probabilities = rows.pop(0)
        alike = supports.get(path.stat().st_size, ())
        support = any(filecmp.cmp(path, other, shallow=False) for other in alike)
        answers.append(Answer(path, label, support, predicted, tuple(probabilities)))
    return answers


def _opened(path: Path, size: int) -> tuple[Any, str]:
    """Decode a file: (array (size, size, 3), ""), or (None, why not)."""
    try:
        return decode(path, size).transpose(1, 2, 0), ""
    except DataError as error:
        return None, str(error)


def _by_size(groups: Iterable[Sequence[Any]]) -> dict[int, list[Path]]:
    """Files by their size in bytes: only those of one size can be copies."""
    found = defaultdict(list)
    for path in (path for group in groups for path in group):
        found[path.stat().st_size].append(path)
    return found


def _printable(text: str) -> str:
    """Text for one line of a terminal, which names of files need not be."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _label(path: Path, class_names: Sequence[str]) -> str:
    """The class that a file's folder is named like, as a bank's names are compared; else ""."""
    folder = path.absolute().parent.name
    if folder in class_names:
        return folder
    like = [name for name in class_names if normalised_name(name) == normalised_name(folder)]
    return like[0] if len(like) == 1 else ""
