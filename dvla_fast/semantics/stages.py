"""The three steps from class names and images to texts (docs/method.md §2), each on its own.

``candidate_attributes`` asks a language model, ``select_attributes`` runs progressive top-k with a
text encoder, ``describe`` asks again. Each takes what the one before returns, for many classes at
once; a class that fails is in the returned ``failures`` with its reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dvla_fast.errors import BankError, LanguageModelError
from dvla_fast.semantics.bank import Candidate
from dvla_fast.semantics.encoders import TextEncoder
from dvla_fast.semantics.language_models.base import Answer, LanguageModel, Request, ShownImage
from dvla_fast.semantics.parsing import Attributes, parse_attributes, parse_description
from dvla_fast.semantics.prompts import Prompt, load_prompt
from dvla_fast.semantics.topk import progressive_top_k

T = TypeVar("T")

_ATTRIBUTES_SCHEMA = {
    "type": "object",
    "properties": {"attributes": {"type": "array", "items": {"type": "string"}}},
    "required": ["attributes"],
    "additionalProperties": False,
}
_DESCRIPTION_SCHEMA = {
    "type": "object",
    "properties": {"description": {"type": "string"}},
    "required": ["description"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class ClassSource:
    """A class to write about.

    Attributes:
        name: as a prompt has it.
        images: support images that may be shown, or none.
        key: what its results are kept under; the name by default. Classes of several episodes need
            keys of their own.
    """

    name: str
    images: tuple[ShownImage, ...] = ()
    key: str = ""

    def __post_init__(self) -> None:
        """Take the name for the key where there is none."""
        object.__setattr__(self, "key", self.key or self.name)


@dataclass(frozen=True)
class Prompts:
    """The prompt files of a construction."""

    candidates: Prompt
    by_name: Prompt
    description: Prompt
    again: Prompt

    @classmethod
    def load(cls, candidates: str = "", description: str = "", again: str = "") -> Prompts:
        """Read the package's prompts, or the user's own; ``candidates`` with and without images.

        Raises:
            LanguageModelError: a file that cannot be used.
        """
        return cls(
            load_prompt("candidates", candidates),
            load_prompt("candidates-by-name", candidates),
            load_prompt("description", description),
            load_prompt("again", again),
        )


@dataclass(frozen=True)
class Failure:
    """Why a class has no texts.

    Attributes:
        stage: that failed.
        message: what went wrong there.
        remedy: what helps, where asking the same again may not; else "".
    """

    stage: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Written(Generic[T]):
    """What a model wrote for one class.

    Attributes:
        value: what was read from the last answer.
        answers: all raw answers, those that could not be used included.
        tokens: (input, output) of all answers; None counts as 0.
        model: the name that the back end gave.
    """

    value: T
    answers: tuple[str, ...]
    tokens: tuple[int, int] = (0, 0)
    model: str = ""


@dataclass
class StageResult(Generic[T]):
    """Results and failures by the keys of the classes: their names, unless they have others.

    ``unusable`` holds the questions of failed classes: their answers are worth asking for again.
    """

    done: dict[str, T] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    unusable: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class Chosen:
    """The outcome of top-k for one class.

    Attributes:
        attributes: chosen, in order of selection.
        candidates: all, with the cosine of every round in which each could still be chosen.
    """

    attributes: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def candidate_attributes(
    model: LanguageModel,
    classes: Sequence[ClassSource],
    prompts: Prompts,
    *,
    count: int = 16,
    attempts: int = 2,
    advance: Callable[[], None] = lambda: None,
) -> StageResult[Written[Attributes]]:
    """Step 1: ask for the distinguishing attributes of each class, in view of its images.

    Args:
        classes: all images of a class are shown in one request.
        count: attributes asked for.
        attempts: answers asked for before a class fails; each after the first names what was wrong
            with the one before.
        advance: called for each class that is through.

    Raises:
        LanguageModelError: nothing more can be answered at all.
    """
    requests = {}
    for item in classes:
        prompt = prompts.candidates if item.images else prompts.by_name
        text = prompt.fill(**{"class": item.name, "count": str(count)})
        requests[item.key] = Request(text, item.images, "candidates", item.name, _ATTRIBUTES_SCHEMA)

    def read(key: str, answer: Answer, last: bool) -> Attributes:
        return parse_attributes(answer, requests[key].subject)

    return _ask(model, requests, read, prompts.again, attempts, advance)


def select_attributes(
    candidates: Mapping[str, Sequence[str]],
    encoder: TextEncoder,
    k: int,
    template: str = "all",
    names: Mapping[str, str] | None = None,
) -> StageResult[Chosen]:
    """Step 2: progressive top-k over the candidates of all classes together.

    Args:
        candidates: attributes by class.
        k, template: as ``progressive_top_k``.
        names: names of the classes, where they are not the keys of ``candidates``.
    """
    result: StageResult[Chosen] = StageResult()
    keys = list(candidates)
    try:
        selections = progressive_top_k(
            [(names or {}).get(key, key) for key in keys],
            [candidates[key] for key in keys],
            encoder,
            k,
            template,
        )
    except BankError as error:
        if len(keys) == 1:
            result.failures[keys[0]] = Failure("selection", str(error))
            return result
        # A text that the encoder cannot read: find its class, and let the others go on.
        for key in keys:
            single = select_attributes({key: candidates[key]}, encoder, k, template, names)
            result.done |= single.done
            result.failures |= single.failures
        return result
    for key, selection in zip(keys, selections):
        texts = candidates[key]
        result.done[key] = Chosen(
            tuple(texts[place] for place in selection.order),
            tuple(Candidate(text, scores) for text, scores in zip(texts, selection.scores)),
        )
    return result


def describe(
    model: LanguageModel,
    attributes: Mapping[str, Sequence[str]],
    prompts: Prompts,
    *,
    attempts: int = 2,
    advance: Callable[[], None] = lambda: None,
    encoder: TextEncoder | None = None,
    names: Mapping[str, str] | None = None,
) -> StageResult[Written[str]]:
    """Step 3: ask for one fluent description of each class, made of its chosen attributes.

    Args:
        attributes: chosen attributes by class.
        attempts, advance: as ``candidate_attributes``. At the last attempt, a description that is
            too long is shortened to whole sentences.
        encoder: that will read the descriptions; one that is longer than it reads is too long,
            unless the encoder truncates. None: any.
        names: as ``select_attributes``.

    Raises:
        LanguageModelError: nothing more can be answered at all.
    """
    requests = {}
    for key, chosen in attributes.items():
        name = (names or {}).get(key, key)
        listed = "\n".join(f"- {attribute}" for attribute in chosen)
        text = prompts.description.fill(**{"class": name, "attributes": listed})
        requests[key] = Request(text, (), "description", name, _DESCRIPTION_SCHEMA)

    def read(key: str, answer: Answer, last: bool) -> str:
        return parse_description(
            answer, trim=last, too_long=lambda text: _too_long(text, encoder, last)
        )

    return _ask(model, requests, read, prompts.again, attempts, advance)


def _too_long(text: str, encoder: TextEncoder | None, last: bool) -> str:
    """Say how much longer a text is than an encoder reads; "": it is not, or may be cut."""
    limit, lengths = getattr(encoder, "max_tokens", None), getattr(encoder, "lengths", None)
    if encoder is None or not limit or lengths is None or getattr(encoder, "truncate", False):
        return ""
    length, unit = lengths([text])[0], getattr(encoder, "unit", "tokens")
    if length <= limit:
        return ""
    # What the model can do about it; and, when it had its chances, what a person can.
    help_ = f"write at most {max(1, len(text.split()) * limit // length)} words"
    if last:
        help_ = "ask for less in construct.description_prompt, or allow the cut: construct.truncate"
    return f"is {length} {unit} long, the {encoder.name} encoder reads {limit} {unit} ({help_})"


def _ask(
    model: LanguageModel,
    requests: Mapping[str, Request],
    read: Callable[[str, Answer, bool], T],
    again: Prompt,
    attempts: int,
    advance: Callable[[], None],
) -> StageResult[Written[T]]:
    """Ask one question per class, and once more where the answer cannot be used."""
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    result: StageResult[Written[T]] = StageResult()
    answered: dict[str, list[Answer]] = {name: [] for name in requests}
    asked: dict[str, list[Request]] = {name: [] for name in requests}
    pending = dict(requests)
    for attempt in range(attempts):
        names, problems = list(pending), dict[str, str]()
        last = attempt == attempts - 1
        for index, answer in model.answers([pending[name] for name in names]):
            name = names[index]
            stage = requests[name].stage
            if isinstance(answer, LanguageModelError):
                result.failures[name] = Failure(stage, str(answer))
                advance()
                continue
            answered[name].append(answer)
            asked[name].append(pending[name])
            try:
                value = read(name, answer, last)
            except LanguageModelError as error:
                problems[name] = str(error)
                if last:
                    result.failures[name] = Failure(stage, str(error), _remedy(stage))
                    result.unusable += asked[name]
                    advance()
                continue
            result.done[name] = _written(value, answered[name])
            advance()
        pending = {
            name: _repeated(requests[name], again, problem) for name, problem in problems.items()
        }
    # In the order of the classes, not of the answers: the same bank however requests overlap.
    result.done = {name: result.done[name] for name in requests if name in result.done}
    result.failures = {name: result.failures[name] for name in requests if name in result.failures}
    return result


def _remedy(stage: str) -> str:
    return (
        f"allow more construct.attempts, change the prompt (construct.{stage}_prompt), or set a "
        "language_model.temperature above 0: at 0 a model repeats its answer"
    )


def _repeated(request: Request, again: Prompt, problem: str) -> Request:
    return Request(
        again.fill(prompt=request.prompt, problem=problem),
        request.images,
        request.stage,
        request.subject,
        request.schema,
        request.max_tokens,
    )


def _written(value: T, answers: Sequence[Answer]) -> Written[T]:
    return Written(
        value,
        tuple(answer.text for answer in answers),
        (
            sum(answer.input_tokens or 0 for answer in answers),
            sum(answer.output_tokens or 0 for answer in answers),
        ),
        answers[-1].model,
    )


def prompt_records(prompts: Prompts, classes: Sequence[ClassSource]) -> dict[str, Any]:
    """Return version and hash of the prompts that these classes need, as a bank records them."""
    records = {"description": prompts.description.record(), "again": prompts.again.record()}
    if any(item.images for item in classes):
        records["candidates"] = prompts.candidates.record()
    if any(not item.images for item in classes):
        records["candidates-by-name"] = prompts.by_name.record()
    return dict(sorted(records.items()))
