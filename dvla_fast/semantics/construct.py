"""A whole bank from class names and support images, resumable; and the texts of one episode.

The build goes step by step over all classes (``dvla_fast.semantics.stages``): all candidates, one
selection for all classes together, all descriptions. Every answer is in a journal beside the bank
before it is used (``dvla_fast.semantics.journal``), so the same call continues after a kill.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dvla_fast.errors import LanguageModelError, OutputError
from dvla_fast.files import write_text_atomic
from dvla_fast.semantics.bank import ClassEntry, SemanticBank, read_bank_json
from dvla_fast.semantics.encoders import TextEncoder
from dvla_fast.semantics.journal import Journal, JournaledModel
from dvla_fast.semantics.language_models.base import LanguageModel, ShownImage
from dvla_fast.semantics.parsing import Attributes
from dvla_fast.semantics.sources import check_classes
from dvla_fast.semantics.stages import (
    Chosen,
    ClassSource,
    Failure,
    Prompts,
    StageResult,
    Written,
    candidate_attributes,
    describe,
    prompt_records,
    select_attributes,
)
from dvla_fast.semantics.tokens import EncodedTexts, encode_bank

if TYPE_CHECKING:
    from dvla_fast.nn import TextTokens

STAGES = ("candidates", "selection", "description")
# Class names, and of each class the images that may be shown.
Episode = tuple[Sequence[str], Sequence[Sequence[ShownImage]]]


@dataclass(frozen=True)
class Settings:
    """How texts are made: attributes asked for and chosen, answers asked for before giving up."""

    top_k: int = 8
    template: str = "all"
    count: int = 16
    attempts: int = 2


@dataclass
class Built:
    """The outcome of a build.

    Attributes:
        bank: the finished classes; None when there is none.
        failures: the others, with the reason.
        reused: answers taken from the journal.
        lost: classes that failed now, and are in the file: it stays as it was.
    """

    bank: SemanticBank | None
    failures: dict[str, Failure] = field(default_factory=dict)
    reused: int = 0
    lost: tuple[str, ...] = ()


def journal_path(output: str | Path) -> Path:
    """Return the journal of a bank: beside it."""
    path = Path(output)
    return path.with_name(f"{path.name}.journal.jsonl")


def construct_bank(
    classes: Sequence[ClassSource],
    model: LanguageModel,
    encoder: TextEncoder,
    output: str | Path,
    *,
    prompts: Prompts | None = None,
    settings: Settings | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Built:
    """Write the bank of these classes to ``output``; the same call continues a build.

    A class that fails is left out, and asked about again by the next call; the others are written,
    but never in the place of a bank that has the class.

    Args:
        classes: names, and the images that may be shown.
        encoder: of the selection.
        provenance: more to record, e.g. the data set and split.
        progress: called with stage, classes through and all of them.

    Raises:
        DataError: a class without a name, or named twice.
        LanguageModelError: the model cannot be used (any more); answers so far are kept.
        OutputError: bank or journal cannot be written, another process builds this bank, or the
            file at ``output`` is not as the build left it (it may have been edited by hand) or has
            classes that are not asked for.
    """
    check_classes(classes)
    prompts, settings = prompts or Prompts.load(), settings or Settings()
    output = Path(output)
    with Journal(journal_path(output)) as journal:
        _check_own(output, journal)
        before = _classes_at(output)
        wanted = {item.name for item in classes}
        if others := [name for name in before if name not in wanted]:
            raise OutputError(
                f"{output}: has {len(others)} class(es) that this build does not ask for "
                f"({', '.join(map(repr, others[:5]))}), and would lose them: give --output another "
                "file, ask for all classes at once, or move the file away"
            )
        asked = JournaledModel(model, journal)
        made = _construct(classes, asked, encoder, prompts, settings, progress)
        bank, failures = made.bank(classes, output.stem, provenance)
        lost = tuple(name for name in before if name in failures)
        if bank is not None and not lost:
            text = bank.to_json()
            journal.mark(_mark(text.encode()))  # before the file: what is there is on record
            write_text_atomic(output, text)
        return Built(bank, failures, asked.reused, lost)


def _classes_at(output: Path) -> list[str]:
    """Return the classes of the bank at a path; none where there is no file."""
    if not output.exists():
        return []
    # not load_bank, to which a name may mean a bank of the package
    return list(SemanticBank.from_dict(read_bank_json(output), str(output)).classes)


def _check_own(output: Path, journal: Journal) -> None:
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; give --output the JSON file of the bank")
    if not output.exists():
        return
    try:
        known = _mark(output.read_bytes()) in journal.marks
    except OSError as error:
        raise OutputError(f"{output}: cannot read ({error.strerror or error})") from error
    if not known:
        raise OutputError(
            f"{output}: was not written by this build, or was edited since; a build would replace "
            "it: move it away, or give --output another file"
        )


def _mark(content: bytes) -> str:
    """SHA-256 of the file: not of what is read of it, which leaves out what a hand may add."""
    return hashlib.sha256(content).hexdigest()


class EpisodeSemantics:
    """Texts of single episodes, from their own class names and support images alone.

    For strictly inductive evaluation: nothing but the episode's supports is ever shown. Answers are
    kept by what was asked, so an episode that comes again asks nothing.

    Args:
        model: the language model.
        encoder: of the selection and of the tokens.
        journal: file of the answers; None: kept in memory.
    """

    def __init__(
        self,
        model: LanguageModel,
        encoder: TextEncoder,
        *,
        prompts: Prompts | None = None,
        settings: Settings | None = None,
        journal: str | Path | None = None,
    ) -> None:
        self.model = JournaledModel(model, Journal(journal))
        self.encoder = encoder
        self.prompts, self.settings = prompts or Prompts.load(), settings or Settings()

    def close(self) -> None:
        """Close the journal."""
        self.model.journal.close()

    def bank(
        self, class_names: Sequence[str], images: Sequence[Sequence[ShownImage]]
    ) -> SemanticBank:
        """Return the bank of one episode.

        Args:
            class_names: the episode's classes.
            images: of each class its support images (``sources.episode_images``), or none.

        Raises:
            DataError: a class without a name, or named twice.
            LanguageModelError: a class that has no texts: an episode cannot go without one.
        """
        return self.banks([(class_names, images)])[0]

    def banks(self, episodes: Sequence[Episode]) -> list[SemanticBank]:
        """Return the banks of several episodes, as ``bank`` would give each.

        All are asked about at once, so a server works on as many requests as it is allowed to.

        Args:
            episodes: class names and images of each, as of ``bank``.

        Raises:
            DataError, LanguageModelError: as ``bank``, of the first episode that has no texts.
        """
        split: list[list[ClassSource]] = []
        for place, (class_names, images) in enumerate(episodes):
            # The names of an episode differ, so no two classes have one key.
            split.append(
                [
                    ClassSource(name, tuple(shown), f"{place} {name}")
                    for name, shown in zip(class_names, images, strict=True)
                ]
            )
            check_classes(split[-1])
        together = [item for classes in split for item in classes]
        made = _construct(together, self.model, self.encoder, self.prompts, self.settings)
        return [self._complete(made, classes) for classes in split]

    def _complete(self, made: _Made, classes: Sequence[ClassSource]) -> SemanticBank:
        bank, failures = made.bank(classes, "episode")
        if failures or bank is None:
            name, failure = next(iter(failures.items()))
            helps = ""
            if failure.remedy:
                helps = f"; what helps, in a new run (--resume keeps settings): {failure.remedy}"
            raise LanguageModelError(
                f"an episode has no texts for {len(failures)} of its classes: {failure.stage} of "
                f"{name!r}: {failure.message}{helps}"
            )
        return bank

    def texts(
        self, class_names: Sequence[str], images: Sequence[Sequence[ShownImage]]
    ) -> EncodedTexts:
        """Return the encoded texts of one episode, class by class; errors as ``bank``."""
        return self.all_texts([(class_names, images)])[0]

    def all_texts(self, episodes: Sequence[Episode]) -> list[EncodedTexts]:
        """Return the encoded texts of several episodes; arguments and errors as ``banks``."""
        return [
            encode_bank(bank, class_names, self.encoder)
            for bank, (class_names, _) in zip(self.banks(episodes), episodes)
        ]

    def tokens(
        self, class_names: Sequence[str], images: Sequence[Sequence[ShownImage]]
    ) -> TextTokens:
        """Return the text tokens (1, way * (k + 1), dim) of one episode; errors as ``bank``."""
        return self.texts(class_names, images).episodes(torch.arange(len(class_names))[None])


@dataclass
class _Made:
    """What the steps gave for classes, by their keys, and with what."""

    model: JournaledModel
    encoder: TextEncoder
    prompts: Prompts
    settings: Settings
    proposed: StageResult[Written[Attributes]] = field(default_factory=StageResult)
    chosen: StageResult[Chosen] = field(default_factory=StageResult)
    described: StageResult[Written[str]] = field(default_factory=StageResult)

    def bank(
        self,
        classes: Sequence[ClassSource],
        name: str,
        provenance: Mapping[str, Any] | None = None,
    ) -> tuple[SemanticBank | None, dict[str, Failure]]:
        """Return the bank of these classes (None: there is no text), and the failures by name."""
        failed = {
            **self.proposed.failures,
            **self.chosen.failures,
            **self.described.failures,
        }
        failures = {item.name: failed[item.key] for item in classes if item.key in failed}
        finished = [item for item in classes if item.key in self.described.done]
        if not finished:
            return None, failures
        proposed, chosen, described = self.proposed.done, self.chosen.done, self.described.done
        entries = {
            item.name: _entry(item, proposed[item.key], chosen[item.key], described[item.key])
            for item in finished
        }
        texts: list[Written[Any]] = [
            *(proposed[item.key] for item in classes if item.key in proposed),
            *(described[item.key] for item in finished),
        ]
        record = _provenance(classes, self.model, self.encoder, self.prompts, self.settings, texts)
        if failures:
            record["failed"] = list(failures)
        return SemanticBank(name, entries, {**record, **(provenance or {})}), failures


def _construct(
    classes: Sequence[ClassSource],
    model: JournaledModel,
    encoder: TextEncoder,
    prompts: Prompts,
    settings: Settings,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> _Made:
    """Take all classes through the three steps."""
    made = _Made(model, encoder, prompts, settings)
    names = {item.key: item.name for item in classes}
    made.proposed = candidate_attributes(
        model,
        classes,
        prompts,
        count=settings.count,
        attempts=settings.attempts,
        advance=_counter(progress, "candidates", len(classes)),
    )
    if made.proposed.done:
        candidates = {key: item.value.kept for key, item in made.proposed.done.items()}
        made.chosen = select_attributes(
            candidates, encoder, settings.top_k, settings.template, names
        )
        progress("selection", len(candidates), len(candidates))
    if made.chosen.done:
        made.described = describe(
            model,
            {key: item.attributes for key, item in made.chosen.done.items()},
            prompts,
            attempts=settings.attempts,
            advance=_counter(progress, "description", len(made.chosen.done)),
            encoder=encoder,
            names=names,
        )
    model.forget([*made.proposed.unusable, *made.described.unusable])
    return made


def _counter(
    progress: Callable[[str, int, int], None], stage: str, total: int
) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    return advance


def _entry(
    item: ClassSource, proposed: Written[Attributes], chosen: Chosen, described: Written[str]
) -> ClassEntry:
    dropped = [{"text": text, "reason": reason} for text, reason in proposed.value.dropped]
    return ClassEntry(
        chosen.attributes,
        described.value,
        chosen.candidates,
        {
            "candidates": list(proposed.answers),
            "description": described.answers[0]
            if len(described.answers) == 1
            else list(described.answers),
        },
        tuple(image.id for image in item.images),
        {"dropped": dropped} if dropped else {},
    )


def _provenance(
    classes: Sequence[ClassSource],
    model: LanguageModel,
    encoder: TextEncoder,
    prompts: Prompts,
    settings: Settings,
    texts: Sequence[Written[Any]],
) -> dict[str, Any]:
    from dvla_fast import __version__

    return {
        "kind": "support-images" if any(item.images for item in classes) else "class-names",
        "model": model.identity["model"],
        "language_model": {
            **model.identity,
            "answered_as": sorted({item.model for item in texts if item.model}),
            "input_tokens": sum(item.tokens[0] for item in texts),
            "output_tokens": sum(item.tokens[1] for item in texts),
        },
        "encoder": encoder.name,
        "selection": asdict(settings),
        "prompts": prompt_records(prompts, classes),
        "date": datetime.date.today().isoformat(),
        "dvla_fast": __version__,
    }
