"""Answers from a file: written by hand, or by another program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dvla_fast.errors import LanguageModelError
from dvla_fast.names import composed
from dvla_fast.semantics.bank import json_problem
from dvla_fast.semantics.language_models.base import Answer, Request, Usage

_FORM = (
    'expected {"candidates": {class: answer, ...}, "description": {class: answer, ...}}, or JSON '
    'lines {"class": ..., "stage": "candidates" or "description", "answer": ...}'
)
STAGES = ("candidates", "description")


class AnswerFile:
    """Back end ``files``: looks answers up by stage and class name.

    An answer is a text as a model would write it, or a JSON list or object. Class names are
    compared in Unicode's composed form (NFC), as names of files on a Mac are not in it.

    Args:
        path: ``.json``, one object by stage and class, or ``.jsonl``, one answer a line.

    Raises:
        LanguageModelError: unreadable, malformed, an unknown stage, or a class answered twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not str(path):
            raise LanguageModelError(
                "back end 'files' needs --language_model.answers, the .json or .jsonl file of them"
            )
        try:
            content = self.path.read_bytes()
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LanguageModelError(
                f"{path}: cannot read the answers ({reason}); give --language_model.answers the "
                "path of a .json or .jsonl file"
            ) from error
        self._answers = self._lines(text) if self.path.suffix == ".jsonl" else self._object(text)
        # An edited file answers anew: nothing of the old one is taken from a journal.
        digest = hashlib.sha256(content).hexdigest()
        self.identity: dict[str, Any] = {
            "backend": "files",
            "model": self.path.name,
            "sha256": digest,
        }
        self.usage = Usage()

    def _object(self, text: str) -> dict[tuple[str, str], str]:
        try:
            content = json.loads(text, object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise LanguageModelError(
                f"{self.path}: not valid JSON ({json_problem(error)}); {_FORM}"
            ) from error
        if not isinstance(content, dict):
            raise LanguageModelError(f"{self.path}: no answers; {_FORM}")
        found: dict[tuple[str, str], str] = {}
        for stage, answers in content.items():
            if stage not in STAGES or not isinstance(answers, dict):
                raise LanguageModelError(f"{self.path}: {stage!r} is no stage's answers; {_FORM}")
            for name, answer in answers.items():
                key = stage, composed(name)
                if key in found:
                    raise LanguageModelError(
                        f"{self.path}: {stage} of {name!r} for the second time; keep one of them"
                    )
                found[key] = _text(answer)
        return found

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise LanguageModelError(
                f"{self.path}: {', '.join(map(repr, twice))} appears twice; keep one of them"
            )
        return result

    def _lines(self, text: str) -> dict[tuple[str, str], str]:
        found: dict[tuple[str, str], str] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                row = json.loads(line)
                stage, name, answer = row["stage"], row["class"], row["answer"]
            except (ValueError, RecursionError) as error:
                problem = json_problem(error).removeprefix("line 1: ")
                raise LanguageModelError(f"{where}: not valid JSON ({problem})") from error
            except (KeyError, TypeError) as error:
                raise LanguageModelError(f"{where}: no answer; {_FORM}") from error
            if stage not in STAGES:
                raise LanguageModelError(
                    f"{where}: stage {stage!r} is unknown; use {' or '.join(STAGES)}"
                )
            if not isinstance(name, str):
                raise LanguageModelError(f"{where}: class {name!r} is no name; {_FORM}")
            key = stage, composed(name)
            if key in found:
                raise LanguageModelError(f"{where}: {stage} of {name!r} for the second time")
            found[key] = _text(answer)
        return found

    def check(self) -> None:
        """Nothing to find out: the file was read when the object was made."""

    def answers(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer | LanguageModelError]]:
        """Look the answers up; a class that the file lacks is an error of that class alone."""
        for index, request in enumerate(requests):
            text = self._answers.get((request.stage, composed(request.subject)))
            if text is None:
                self.usage.failures += 1
                about = f"{request.stage} answer for class {request.subject!r}"
                yield index, LanguageModelError(f"{self.path}: no {about}; add it")
                continue
            answer = Answer(text, model=self.path.name)
            self.usage.count(answer)
            yield index, answer


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
