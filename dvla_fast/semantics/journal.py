"""Every answer of a language model, kept from the moment it comes.

A journal is a file of JSON lines that is only ever added to; each line is on the disk before the
answer is used. So a kill at any moment costs at most the answers under way, and a question that was
answered once is never asked again: not after a kill, not with another k, not in another episode.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dvla_fast.errors import DataError, LanguageModelError, OutputError
from dvla_fast.semantics.language_models.base import (
    MAX_TOKENS,
    Answer,
    LanguageModel,
    Request,
    Usage,
)

FORMAT = "dvla-fast-answers/1"


class Journal:
    """Answers by key, in a file that one process writes at a time.

    Args:
        path: the file, made if there is none, with its folder; None: in memory only.

    Raises:
        OutputError: cannot be written, in use by another process, or no journal; naming the line
            where one is damaged. A torn last line is what a kill leaves, and is cut off.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._answers: dict[str, Answer] = {}
        self.marks: set[str] = set()
        self._file = -1
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._lock()
            self._read()
        except OSError as error:
            self.close()
            raise OutputError(
                f"{self.path}: cannot keep answers here ({error.strerror or error}); give --output "
                "a place that you may write to"
            ) from error
        except OutputError:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """Return the answer kept under a key."""
        return self._answers.get(key)

    def add(self, key: str, request: Request, answer: Answer) -> None:
        """Keep an answer; returns when it is on the disk.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        self._write(
            {
                "key": key,
                "stage": request.stage,
                "class": request.subject,
                "answer": answer.text,
                "finish": answer.finish,
                "tokens": [answer.input_tokens, answer.output_tokens],
                "model": answer.model,
            }
        )
        self._answers[key] = answer

    def forget(self, keys: Iterable[str]) -> None:
        """Ask these questions again next time; what was answered stays in the file."""
        for key in dict.fromkeys(keys):
            if self._answers.pop(key, None) is not None:
                self._write({"forget": key})

    def mark(self, text: str) -> None:
        """Keep a note for the next call, in ``marks``."""
        if text not in self.marks:
            self._write({"mark": text})
            self.marks.add(text)

    def close(self) -> None:
        """Close the file; the answers stay readable."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _lock(self) -> None:
        import fcntl  # not on every system

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{self.path}: another process is building this bank; wait for it"
            ) from error

    def _read(self) -> None:
        assert self.path is not None
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines, torn = content[:whole].splitlines(), content[whole:]
        if not lines and not _line({"format": FORMAT}).startswith(torn):
            raise self._damaged(1)  # another's file, which stays as it is
        for number, line in enumerate(lines, 1):
            self._take(number, line)
        if torn:
            os.ftruncate(self._file, whole)
        if not lines:
            self._write({"format": FORMAT})

    def _take(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            if number == 1:
                if row["format"] != FORMAT:
                    raise ValueError
            elif "mark" in row:
                self.marks.add(row["mark"])
            elif "forget" in row:
                self._answers.pop(row["forget"], None)
            else:
                read, written = row["tokens"]
                answer = Answer(row["answer"], row["finish"], read, written, row["model"])
                self._answers[row["key"]] = answer
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(number) from error

    def _damaged(self, number: int) -> OutputError:
        what = "no journal of answers" if number == 1 else f"line {number} is damaged"
        return OutputError(
            f"{self.path}: {what}; remove {'the file' if number == 1 else 'that line'}, or "
            "give --output another place"
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = memoryview(_line(row))
        try:
            before = os.fstat(self._file).st_size
            try:
                while line:
                    line = line[os.write(self._file, line) :]
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, before)  # the next line must not follow half of this one
                raise
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot keep an answer ({error.strerror or error}); free space and "
                "run the same command again: what is there stays"
            ) from error


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


class JournaledModel:
    """A language model whose answers are kept, and asked for once only.

    Args:
        model: who is asked.
        journal: where answers are kept.
    """

    def __init__(self, model: LanguageModel, journal: Journal) -> None:
        self.model, self.journal = model, journal
        self.reused = 0

    @property
    def identity(self) -> dict[str, Any]:
        """The model's own."""
        return self.model.identity

    @property
    def usage(self) -> Usage:
        """What the model was asked in this process; kept answers do not count."""
        return self.model.usage

    def check(self) -> None:
        """Check the model."""
        self.model.check()

    def key(self, request: Request) -> str:
        """Hash all that an answer depends on: model, prompt, images, schema, length.

        Raises:
            DataError: an image cannot be read.
        """
        content = [
            self.identity,
            request.stage,
            request.subject,
            request.prompt,
            [image.digest for image in request.images],
            request.schema,
            request.max_tokens or MAX_TOKENS,  # another limit of the model is in its identity
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def answers(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer | LanguageModelError]]:
        """Yield kept answers first, then ask for the others and keep each as it comes."""
        places: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                key = self.key(request)
            except DataError as error:
                yield index, LanguageModelError(str(error))
                continue
            kept = self.journal.get(key)
            if kept is None:
                places.setdefault(key, []).append(index)
            else:
                self.reused += 1
                yield index, kept
        keys = list(places)
        if not keys:
            return
        if self.reused:  # it is the other classes that fail, if any do now
            getattr(self.model, "answered_before", lambda: None)()
        for place, answer in self.model.answers([requests[places[key][0]] for key in keys]):
            key = keys[place]
            if isinstance(answer, Answer):
                self.journal.add(key, requests[places[key][0]], answer)
            for index in places[key]:
                yield index, answer

    def forget(self, requests: Iterable[Request]) -> None:
        """Ask these questions again next time."""
        self.journal.forget(self.key(request) for request in requests)
