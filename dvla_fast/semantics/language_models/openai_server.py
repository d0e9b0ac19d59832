"""Any server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, hosted ones.

Requests run side by side in threads. The retries are this module's own, not the client library's:
they are counted, they stop at once when the work stops, and tests need not wait for them.
"""

from __future__ import annotations

import base64
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dvla_fast.characters import printable
from dvla_fast.errors import DataError, LanguageModelError, MissingDependencyError
from dvla_fast.semantics.language_models.base import (
    MAX_TOKENS,
    Answer,
    Finish,
    Request,
    Usage,
    limit_record,
)
from dvla_fast.semantics.language_models.server_errors import (
    OPTIONAL,
    moderated,
    no_client,
    refused_parameters,
    retry_after,
    said,
    secrets_of,
    too_long,
    unreachable,
    userinfo_of,
    words,
)

DEFAULT_URL = "https://api.openai.com/v1"
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
# A server that asks to wait longer than this is out of quota rather than busy.
_LONGEST_RETRY_AFTER = 300.0
# What reading a reply raises that is not as the protocol says.
_MALFORMED = (ValueError, TypeError, AttributeError, LookupError)
_RETRIED_STATUS = (408, 409, 425, 429)
# So many requests that end alike, with all their retries and before any answer, end the work.
_HOPELESS = 16


class _Stopped(Exception):
    """Nothing further can be answered: the message of the LanguageModelError to raise."""


class _ErrorReply(ValueError):
    """Status 200, and an error in the place of an answer."""


class _GivenUp(LanguageModelError):
    """A request that all its retries did not help; ``way``: what else must be so to be alike."""

    def __init__(self, about: str, reason: str, way: object) -> None:
        super().__init__(f"{about}: {reason}")
        self.reason, self.way = reason, way


class OpenAIServer:
    """Back end ``openai``.

    Args:
        model: the server's name for the model; empty: the one that it serves, if it serves one.
        base_url: e.g. ``http://localhost:8000/v1``; empty: ``OPENAI_BASE_URL``, else OpenAI's own.
        api_key_env: environment variable that holds the key. A key is needed for OpenAI's own
            server only; others say so themselves if they want one.
        concurrency: requests under way at one time.
        timeout: seconds to wait for one answer.
        retries: times that a request is sent again after 408, 409, 429, 5xx, a time-out, a broken
            connection or a reply that is none. The waits double from 1 s to 60 s, less up to half
            of each at random; a server's longer ``Retry-After`` (up to five minutes) goes before.
        temperature, seed: passed on; a server that refuses one gets requests without it, once such
            a request was answered.
        structured: ask for answers that follow the request's JSON schema; refused as a temperature.
        max_tokens: longest answer, thinking included, where a request does not say.
        wait: how to wait a number of seconds, for tests.

    Raises:
        MissingDependencyError: the openai package is not installed.
        LanguageModelError: no key for OpenAI's own server, a key or an address that cannot be sent,
            a proxy or certificates that cannot be used.
    """

    def __init__(
        self,
        model: str = "",
        *,
        base_url: str = "",
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 6,
        temperature: float = 0.0,
        seed: int = 0,
        structured: bool = True,
        max_tokens: int = MAX_TOKENS,
        wait: Callable[[float], None] | None = None,
    ) -> None:
        if min(concurrency, max_tokens) < 1 or retries < 0 or not timeout > 0:
            raise ValueError(
                "concurrency and max_tokens must be at least 1, retries at least 0 and timeout "
                f"above 0, got {concurrency}, {max_tokens}, {retries} and {timeout}"
            )
        try:
            import openai
        except ImportError as error:
            raise MissingDependencyError(
                "back end 'openai' needs the openai package, which is not installed; run "
                "pip install 'dvla-fast[semantics]'"
            ) from error
        self._openai = openai
        url = (base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).strip()
        key = os.environ.get(api_key_env, "").strip()
        userinfo = userinfo_of(url)
        self.base_url = url.replace(f"{userinfo}@", "***@", 1) if userinfo else url
        self._secrets = secrets_of(key, userinfo)
        if not (key.isascii() and key.isprintable()):
            raise LanguageModelError(
                f"environment variable {api_key_env} holds characters that no key has (line breaks "
                "or other control characters, or beyond ASCII); copy the key into it again"
            )
        if not key and url.rstrip("/") == DEFAULT_URL:
            raise LanguageModelError(
                f"no key: set the environment variable {api_key_env} to use {DEFAULT_URL}, or give "
                "--language_model.base_url (or OPENAI_BASE_URL) the address of another server"
            )
        self._key_env, self._has_key = api_key_env, bool(key)
        # max_retries=0: see the top of this file. A server without keys still gets a header.
        try:
            self._client = openai.OpenAI(
                api_key=key or "none", base_url=url, timeout=timeout, max_retries=0
            )
        except Exception as failed:
            # without its cause: the text of some quotes parts of the address
            raise LanguageModelError(
                no_client(self.base_url, failed, self._short(failed))
            ) from None
        self.model = model
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens
        self._wait = wait
        self._checked = self._answered = False
        self._given_up: list[_GivenUp] = []  # before the first answer
        self._random = random.Random()  # jitter only: no answer depends on it
        self._lock = threading.Lock()
        # For each parameter that servers may refuse, how it is sent; None: left out.
        self._sent: dict[str, str | None] = {name: name for name in OPTIONAL}
        if not structured:
            self._sent["response_format"] = None
        self.usage = Usage()

    @property
    def identity(self) -> dict[str, Any]:
        """Model, temperature, seed, limit; not the address, so a build can go on elsewhere."""
        if not self.model:
            self.check()
        return {
            "backend": "openai",
            "model": self.model,
            "temperature": self.temperature,
            "seed": self.seed,
            **limit_record(self.max_tokens),
        }

    @property
    def structured(self) -> bool:
        """Whether answers are still asked for by JSON schema."""
        return self._sent["response_format"] is not None

    def check(self) -> None:
        """Ask the server for its models: finds a wrong address before the work.

        Raises:
            LanguageModelError: unreachable; or no model name given, and the key refused or not just
                one model there.
        """
        error = self._openai
        try:
            served = [item.id for item in self._client.models.list().data or ()]
        except (error.AuthenticationError, error.PermissionDeniedError) as refused:
            if not self.model:
                raise LanguageModelError(self._key_refused(refused)) from refused
            served = []  # keys that may ask models need not be allowed to list them
        except error.APIConnectionError as failed:
            raise LanguageModelError(self._unreachable(failed)) from failed
        except (error.OpenAIError, *_MALFORMED):
            served = []  # not every server lists its models
        self._checked = True
        if self.model:
            return
        if len(served) != 1:
            found = f"it serves {', '.join(served[:10])}" if served else "it does not list any"
            raise LanguageModelError(
                f"{self.base_url}: which model? Give --language_model.model its name ({found})"
            )
        self.model = served[0]

    def answers(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer | LanguageModelError]]:
        """Answer ``concurrency`` requests at a time; yields each when it is there.

        Raises:
            LanguageModelError: key, model or address refused, the quota used up, the server no
                longer reachable after all retries, or the first 16 requests ended alike after
                theirs.
        """
        if not self._checked:
            self.check()
        results: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        stop = threading.Event()
        todo = iter(enumerate(requests))
        # A place is free again when its answer was taken and, by then, kept: what a kill can cost
        # is never more than ``concurrency`` answers.
        places = threading.Semaphore(self.concurrency)
        # Daemons: an interrupted program does not wait for answers that nobody will read.
        # A few more than places: they prepare images while others wait for answers.
        ahead = 4 if any(request.images for request in requests) else 0
        threads = min(self.concurrency + ahead, len(requests))
        for _ in range(threads):
            threading.Thread(
                target=self._work, args=(todo, places, results, stop), daemon=True
            ).start()
        running = threads
        failure: BaseException | None = None
        try:
            while running:
                result = results.get()
                if result is None:
                    running -= 1
                    continue
                index, answer = result
                if isinstance(answer, Answer):
                    self.usage.count(answer)
                    yield index, answer
                elif isinstance(answer, LanguageModelError):
                    self.usage.failures += 1
                    hopeless = self._hopeless(answer)
                    if hopeless is not None:
                        stop.set()
                        failure = failure or hopeless
                    yield index, answer
                else:  # the others under way are still awaited: their answers count
                    failure = failure or answer
                places.release()
        finally:
            stop.set()
            places.release(max(1, threads))  # whoever waits for a place: go home
        if isinstance(failure, _Stopped):
            raise LanguageModelError(str(failure)) from failure.__cause__
        if failure is not None:
            raise failure

    def _work(
        self,
        todo: Iterator[tuple[int, Request]],
        places: threading.Semaphore,
        results: queue.SimpleQueue[tuple[int, Any] | None],
        stop: threading.Event,
    ) -> None:
        """Answer what is to do until nothing is left, then put None."""
        while True:
            with self._lock:
                item = None if stop.is_set() else next(todo, None)
            if item is None:
                break
            index, request = item
            result: Any
            try:
                content = _content(request)
            except Exception as error:
                content, result = None, error
            places.acquire()
            if stop.is_set():
                places.release()  # for the next that waits, to find the same
                break
            try:
                result = self._ask(request, content, stop) if content else result
            except BaseException as error:  # told apart where it arrives
                result = error
            if isinstance(result, DataError):  # an image that cannot be read
                result = LanguageModelError(str(result))
            if not isinstance(result, Answer | LanguageModelError):  # _Stopped, or a mistake
                stop.set()
            results.put((index, result))
        results.put(None)

    def _ask(
        self, request: Request, content: list[dict[str, Any]], stop: threading.Event
    ) -> Answer:
        """Send one request until it is answered.

        Raises:
            LanguageModelError: this request cannot be answered; _Stopped: none can.
        """
        changed: dict[str, str | None] = {}  # how this request is sent, kept once it is answered
        tries = 0
        while True:
            sent = {**self._sent, **changed}
            try:
                answer = self._answer(self._create(request, content, sent))
            except (self._openai.OpenAIError, *_MALFORMED) as failed:
                refused = refused_parameters(failed, sent)
                if refused:
                    changed |= refused
                    continue
                problem = self._problem(failed, request, tries >= self.retries)
                delay = retry_after(failed)
            else:
                with self._lock:
                    self._sent |= changed
                self._answered = True
                return answer
            if tries >= self.retries:
                raise problem
            tries += 1
            with self._lock:
                self.usage.retries += 1
            self._pause(tries, delay, stop)

    def answered_before(self) -> None:
        """Take note of answers kept from an earlier run: key and server are good."""
        self._answered = True

    def _problem(self, failed: Exception, request: Request, last: bool) -> _GivenUp:
        """Return what to raise if no retry helps; raise what none can (as ``_ask``)."""
        error, about = self._openai, self._about(request)
        way: object = "reply"
        if isinstance(failed, error.APITimeoutError):
            way = "timeout"
            reason = (
                f"no answer within {self.timeout:g} s; raise --language_model.timeout, or lower "
                "--language_model.concurrency"
            )
        elif isinstance(failed, error.APIConnectionError):
            way, reason = "connection", self._unreachable(failed)
            if last:
                raise _Stopped(reason) from failed
        elif isinstance(failed, error.APIStatusError):
            way, reason = failed.status_code, self._status_problem(failed, request)
            delay = retry_after(failed)
            if delay is not None and delay > _LONGEST_RETRY_AFTER:
                raise _Stopped(
                    f"{self.base_url}: asks to wait {delay:.0f} s ({self._short(failed)}); run "
                    "the same command again then: answers so far are kept"
                ) from failed
        elif isinstance(failed, _ErrorReply):
            reason = (
                f"{self.base_url} sent an error in the place of an answer ({self._short(failed)})"
            )
        else:  # a proxy's page, a cut-off reply, an answer without a message
            reason = (
                f"{self.base_url} sent a reply that is none ({self._short(failed)}); is this an "
                "OpenAI-compatible address, ending in /v1?"
            )
        problem = _GivenUp(about, reason, way)
        problem.__cause__ = failed
        return problem

    def _hopeless(self, problem: LanguageModelError) -> _Stopped | None:
        """Return why to stop, if nothing was answered yet and all that was given up is alike."""
        if self._answered or not isinstance(problem, _GivenUp):
            return None
        self._given_up.append(problem)
        if len(self._given_up) < _HOPELESS or len({item.way for item in self._given_up}) > 1:
            return None
        return _Stopped(
            f"the first {_HOPELESS} requests to {self.base_url} all ended alike: "
            f"{self._given_up[0].reason}; run the same command again when this is mended: answers "
            "so far are kept"
        )

    def _create(self, request: Request, content: list[dict[str, Any]], sent: dict[str, Any]) -> Any:
        values: dict[str, Any] = {
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": request.max_tokens or self.max_tokens,
        }
        if request.schema is not None:
            values["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": request.stage or "answer",
                    "schema": dict(request.schema),
                    "strict": True,
                },
            }
        options = {sent[key]: value for key, value in values.items() if sent[key] is not None}
        # plain text where there is no image: some text-only servers know no parts
        message: Any = {"role": "user", "content": content if request.images else request.prompt}
        return self._client.chat.completions.create(model=self.model, messages=[message], **options)

    def _answer(self, reply: Any) -> Answer:
        if isinstance(reply, str):  # no JSON: what the client library makes of another type
            raise ValueError(reply or "it is empty")
        error = getattr(reply, "error", None)
        if error:
            raise _ErrorReply(words(error) or str(error))
        if not reply.choices:
            raise ValueError("it holds no answer")
        choice = reply.choices[0]
        message, usage = choice.message, reply.usage
        text = message.content
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(part.get("text", "") for part in text)
        if text is None and choice.finish_reason:  # all that was written is thinking
            text = ""
        refusal = getattr(message, "refusal", None)
        finish: Finish = "length" if choice.finish_reason == "length" else "stop"
        if refusal or choice.finish_reason == "content_filter":
            text, finish = refusal or text or "", "refusal"
        if not isinstance(text, str):
            raise ValueError("the message holds no text")
        return Answer(
            text,
            finish,
            getattr(usage, "prompt_tokens", None),
            getattr(usage, "completion_tokens", None),
            str(reply.model or self.model),
        )

    def _status_problem(self, failed: Any, request: Request) -> str:
        """Return what is wrong with one request; raise what no request or no retry can mend."""
        status, text = failed.status_code, self._short(failed)
        # 403 after an answer: the key is good, what was asked is not
        if status == 401 or (status == 403 and not (self._answered or moderated(failed))):
            raise _Stopped(self._key_refused(failed)) from failed
        if status == 404:
            raise _Stopped(
                f"{self.base_url}: no model {self.model!r} here, or no OpenAI-compatible server at "
                f"this address, which should end in /v1 ({text}); check --language_model.model and "
                "--language_model.base_url"
            ) from failed
        if status == 402 or failed.code == "insufficient_quota":
            raise _Stopped(
                f"{self.base_url}: the quota is used up ({text}); top it up and run the same "
                "command again: answers so far are kept"
            ) from failed
        reason = f"the server answered {status} ({text})"
        if too_long(failed):
            reason += "; lower --language_model.max_tokens, or show fewer or smaller images"
        if status < 500 and status not in _RETRIED_STATUS:
            raise LanguageModelError(f"{self._about(request)}: {reason}") from failed
        return reason

    def _pause(self, tries: int, asked: float | None, stop: threading.Event) -> None:
        longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(tries - 1, 30))
        delay = longest * (0.5 + 0.5 * self._random.random())
        if asked is not None:
            # A little more than asked, at random: else all come back at the same moment. Never
            # less than our own: some servers always ask for 0, and some clocks are wrong.
            delay = max(delay, asked * (1 + 0.1 * self._random.random()))
        if self._wait is not None:
            self._wait(delay)
        else:
            stop.wait(delay)
        if stop.is_set():
            raise _Stopped(f"{self.base_url}: the work was stopped")

    def _about(self, request: Request) -> str:
        subject = f" of {request.subject!r}" if request.subject else ""
        return f"{request.stage or 'request'}{subject}"

    def _short(self, error: object) -> str:
        """Return what an error says, in short and without key, password and terminal codes."""
        text = said(error)
        text = self._secrets.sub("***", text) if self._secrets else text
        text = " ".join(printable(text).split()) or type(error).__name__
        return text if len(text) <= 160 else f"{text[:160]}..."

    def _unreachable(self, failed: Exception) -> str:
        return unreachable(self.base_url, self._short(failed.__cause__ or failed))

    def _key_refused(self, failed: Exception) -> str:
        held = "holds another one" if self._has_key else "is not set"
        return (
            f"{self.base_url}: refuses the key ({self._short(failed)}); environment variable "
            f"{self._key_env} {held}: set it to this server's key"
        )


def _content(request: Request) -> list[dict[str, Any]]:
    """Return the parts of a message: images, then text (DataError for an unreadable image)."""
    content: list[dict[str, Any]] = [_image_part(*image.encoded()) for image in request.images]
    return [*content, {"type": "text", "text": request.prompt}]


def _image_part(content: bytes, media_type: str) -> dict[str, Any]:
    data = base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}
