"""A language model for tests, a build that runs in a process of its own, and a server for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics import build_encoder
from dvla_fast.semantics.construct import Built, Settings, construct_bank
from dvla_fast.semantics.language_models.base import Answer, Request, ShownImage, Usage
from dvla_fast.semantics.language_models.openai_server import OpenAIServer
from dvla_fast.semantics.stages import ClassSource
from tests.semantics.loopback import Reply, prompt_of

PARTS = ("bill", "wings", "tail", "face", "crown", "legs", "breast", "back", "eyes", "throat")
COLOURS = ("black", "white", "grey", "brown", "red", "yellow", "blue")


def attributes_of(name: str, count: int = 6) -> list[str]:
    """Attributes that depend on the name alone."""
    number = sum(name.encode())
    return [f"{COLOURS[(number + i) % 7]} {PARTS[(number * 3 + i) % 10]}" for i in range(count)]


def good_answer(stage: str, name: str) -> str:
    if stage == "candidates":
        return json.dumps({"attributes": attributes_of(name)})
    listed = ", ".join(attributes_of(name, 2))
    return json.dumps({"description": f"The {name} is a bird with {listed}."})


class Scripted:
    """Answers by a function of the request; keeps what it was asked."""

    def __init__(
        self,
        answer: Callable[[Request], str | Answer | LanguageModelError] | None = None,
        name: str = "scripted",
    ) -> None:
        self._answer = answer or (lambda request: good_answer(request.stage, request.subject))
        self.identity: dict[str, Any] = {"backend": "scripted", "model": name}
        self.usage = Usage()
        self.asked: list[Request] = []

    def check(self) -> None: ...

    def answers(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer | LanguageModelError]]:
        for index in reversed(range(len(requests))):  # any order is allowed
            self.asked.append(requests[index])
            answer = self._answer(requests[index])
            if isinstance(answer, str):
                answer = Answer(answer, "stop", 100, 10, "scripted-1")
            yield index, answer


def image(seed: int) -> ShownImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return ShownImage(f"image-{seed}", pixels)


def spoil(stage: str, name: str, answer: Any, times: int = 99) -> Scripted:
    """Good answers but for one class at one stage."""

    def answers(request: Request) -> Any:
        nonlocal times
        if (request.stage, request.subject) == (stage, name) and times > 0:
            times -= 1
            return answer
        return good_answer(request.stage, request.subject)

    return Scripted(answers)


def bird(request: dict[str, Any], number: int) -> Reply:
    """What the loopback server answers to the package's prompts about birds."""
    prompt = prompt_of(request)
    stage = "candidates" if "distinguishing attributes" in prompt else "description"
    found = re.search(r"attributes of the (.+?)\?|for the class (.+?):", prompt)
    assert found, prompt
    name = found[1] or found[2]
    if name == "bird 3" and "could not be used" not in prompt:
        return Reply("It is a bird. I like it.")  # the first answer is of no use
    return Reply(good_answer(stage, name))


def build_birds(url: str, output: str, count: int, concurrency: int) -> Built:
    """Build a bank of birds; runs in a child process too, so it is importable by name."""
    return construct_bank(
        [ClassSource(f"bird {i}") for i in range(count)],
        OpenAIServer("tiny-vl", base_url=url, concurrency=concurrency),
        build_encoder("hashed-ngram", 64),
        Path(output),
        settings=Settings(top_k=3),
    )
