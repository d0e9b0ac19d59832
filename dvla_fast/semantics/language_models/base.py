"""What the construction of a bank needs of a language model: text and images in, text out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from dvla_fast.characters import whole_characters
from dvla_fast.data.decode import open_rgb, pillow
from dvla_fast.errors import LanguageModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How an answer ended: by itself, at the limit of tokens, or with a refusal.
Finish = Literal["stop", "length", "refusal"]
# Tokens of the longest answer, where nothing else is asked for.
MAX_TOKENS = 1024


@dataclass(frozen=True)
class ShownImage:
    """An image that is shown to a model.

    Attributes:
        id: what a bank records of it, e.g. its path below the data set's folder.
        source: a file, or uint8 (H, W, 3).
        max_side: longer side in pixels above which the image is made smaller before it is sent.
    """

    id: str
    source: Path | NDArray[np.uint8]
    max_side: int = 512

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file or the pixels, and of the size it is shown in.

        Raises:
            DataError: the file cannot be read.
        """
        content = hashlib.sha256(f"{self.max_side} ".encode())
        if isinstance(self.source, Path):
            try:
                content.update(self.source.read_bytes())
            except OSError:
                open_rgb(self.source)  # says what is wrong with it
                raise
        else:
            content.update(f"{self.source.shape} ".encode())
            content.update(np.ascontiguousarray(self.source).tobytes())
        return content.hexdigest()

    def picture(self) -> Any:
        """Return the PIL image, no side longer than ``max_side``.

        Raises:
            DataError: unreadable, as ``dvla_fast.data.decode.open_rgb``.
        """
        if isinstance(self.source, Path):
            image = open_rgb(self.source)[0]
        else:
            image = pillow().fromarray(np.ascontiguousarray(self.source))
        longest = max(image.size)
        if longest > self.max_side:
            sides = (max(1, round(side * self.max_side / longest)) for side in image.size)
            image = image.resize(tuple(sides), pillow().Resampling.BICUBIC)
        return image

    def encoded(self) -> tuple[bytes, str]:
        """Return the image as a file's bytes and their media type.

        JPEG for photographs; PNG for small images, which lose most by compression.
        """
        image = self.picture()
        stream = io.BytesIO()
        if max(image.size) <= 128:
            image.save(stream, "PNG")
            return stream.getvalue(), "image/png"
        image.save(stream, "JPEG", quality=92)
        return stream.getvalue(), "image/jpeg"


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        prompt: the whole text.
        images: shown before the text, in this order.
        stage, subject: which step asks ("candidates", "description"), about which class.
        schema: JSON schema of the answer, for back ends that can enforce one.
        max_tokens: longest answer; None: the model's own limit.
    """

    prompt: str
    images: tuple[ShownImage, ...] = ()
    stage: str = ""
    subject: str = ""
    schema: Mapping[str, Any] | None = field(default=None, hash=False)
    max_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: as it came, but for halves of surrogate pairs, which no file can hold.
        finish: how it ended; a refusal's text may be empty.
        input_tokens, output_tokens: None where the back end does not count, or not in numbers.
        model: the name that the back end gives for itself; may be more exact than the one asked.
    """

    text: str
    finish: Finish = "stop"
    input_tokens: int | None = None
    output_tokens: int | None = None
    model: str = ""

    def __post_init__(self) -> None:
        """Make text and model such that they can be written, and counts such that they add up."""
        object.__setattr__(self, "text", whole_characters(self.text))
        object.__setattr__(self, "model", whole_characters(self.model))
        object.__setattr__(self, "input_tokens", _count(self.input_tokens))
        object.__setattr__(self, "output_tokens", _count(self.output_tokens))


@dataclass
class Usage:
    """What a model was used for in this process; ``cost`` in the currency of the prices given."""

    answers: int = 0
    failures: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    uncounted: int = 0

    def count(self, answer: Answer) -> None:
        """Add an answer."""
        self.answers += 1
        if answer.input_tokens is None or answer.output_tokens is None:
            self.uncounted += 1
        self.input_tokens += answer.input_tokens or 0
        self.output_tokens += answer.output_tokens or 0

    def cost(self, input_price: float, output_price: float) -> float:
        """Return the cost at prices for a million tokens."""
        return (self.input_tokens * input_price + self.output_tokens * output_price) / 1e6


class LanguageModel(Protocol):
    """Answers many requests.

    Attributes:
        identity: everything that changes its answers (back end, model, temperature, seed), as
            plain JSON; part of the key under which an answer is kept.
        usage: what was asked so far.
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def usage(self) -> Usage: ...

    def check(self) -> None:
        """Find out before the work whether the model can be used.

        Raises:
            LanguageModelError: it cannot; with the remedy.
        """
        ...

    def answers(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer | LanguageModelError]]:
        """Yield (index of the request, its answer or what went wrong), as they come, in any order.

        Raises:
            LanguageModelError: nothing further can be answered (no server, wrong key); answers that
                were under way are yielded before.
        """
        ...


def limit_record(max_tokens: int) -> dict[str, int]:
    """Return what an identity says of the limit: nothing of the usual one, as earlier versions."""
    return {} if max_tokens == MAX_TOKENS else {"max_tokens": max_tokens}


def _count(value: Any) -> int | None:
    """Return a count of tokens, which some servers send as a text."""
    try:
        return int(value)
    except (ValueError, TypeError, OverflowError):
        return None


def answer_all(model: LanguageModel, requests: Sequence[Request]) -> list[Answer]:
    """Answer all requests, in their order.

    Raises:
        LanguageModelError: the first request that could not be answered.
    """
    found: dict[int, Answer] = {}
    for index, answer in model.answers(requests):
        if isinstance(answer, LanguageModelError):
            raise answer
        found[index] = answer
    return [found[index] for index in range(len(requests))]
