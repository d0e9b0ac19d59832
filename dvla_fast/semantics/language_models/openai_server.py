"""Any server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, hosted ones.

Requests run side by side in threads. The retries are this module's own, not the client library's:
they are counted, they stop at once when the work stops, and tests need not wait for them.
"""

from __future__ import annotations

import base64
import email.utils
import math
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dvla_fast.errors import DataError, LanguageModelError, MissingDependencyError
from dvla_fast.semantics.characters import printable
from dvla_fast.semantics.language_models.base import Answer, Finish, Request, Usage

DEFAULT_URL = "https://api.openai.com/v1"
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
# A server that asks to wait longer than this is out of quota rather than busy.
_LONGEST_RETRY_AFTER = 300.0
# What reading a reply raises that is not as the protocol says.
_MALFORMED = (ValueError, TypeError, AttributeError, LookupError)
_RETRIED_STATUS = (408, 409, 425, 429)
# What a server may refuse although the protocol has it; left out from then on.
_OPTIONAL = ("response_format", "seed", "temperature", "max_tokens")
_SCHEMA_WORDS = ("response_format", "json_schema", "json schema", "structured", "guided", "grammar")


class _Stopped(Exception):
    """Nothing further can be answered: the message of the LanguageModelError to raise."""


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
            of each at random; a server's ``Retry-After`` (up to five minutes) goes before.
        temperature, seed: passed on; servers that refuse one get requests without it.
        structured: ask for answers that follow the request's JSON schema; a server that refuses
            gets plain requests from then on.
        wait: how to wait a number of seconds, for tests.

    Raises:
        MissingDependencyError: the openai package is not installed.
        LanguageModelError: no key for OpenAI's own server, a key or an address that cannot be sent.
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
        wait: Callable[[float], None] | None = None,
    ) -> None:
        if concurrency < 1 or retries < 0 or not timeout > 0:
            raise ValueError(
                f"concurrency must be at least 1, retries at least 0 and timeout above 0, got "
                f"{concurrency}, {retries} and {timeout}"
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
        userinfo = _userinfo(url)
        self.base_url = url.replace(f"{userinfo}@", "***@", 1) if userinfo else url
        self._secrets = _secrets(key, userinfo)
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
        # InvalidURL, of a package whose name depends on the version of openai
        except Exception:
            raise LanguageModelError(
                f"{self.base_url}: is no address; give --language_model.base_url or "
                "OPENAI_BASE_URL one such as http://localhost:8000/v1"
            ) from None  # its text quotes parts of the address
        self.model = model
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.temperature, self.seed = temperature, seed
        self._wait = wait
        self._checked = False
        self._random = random.Random()  # jitter only: no answer depends on it
        self._lock = threading.Lock()
        # For each parameter that servers may refuse, how it is sent; None: left out.
        self._sent: dict[str, str | None] = {name: name for name in _OPTIONAL}
        if not structured:
            self._sent["response_format"] = None
        self.usage = Usage()

    @property
    def identity(self) -> dict[str, Any]:
        """Model, temperature and seed; not the address, so a build can go on elsewhere."""
        if not self.model:
            self.check()
        return {
            "backend": "openai",
            "model": self.model,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    @property
    def structured(self) -> bool:
        """Whether answers are still asked for by JSON schema."""
        return self._sent["response_format"] is not None

    def check(self) -> None:
        """Ask the server for its models: finds a wrong address or key before the work.

        Raises:
            LanguageModelError: unreachable, key refused, or no model name given and not just one
                model there.
        """
        error = self._openai
        try:
            served = [item.id for item in self._client.models.list().data or ()]
        except (error.AuthenticationError, error.PermissionDeniedError) as refused:
            raise LanguageModelError(self._key_refused(refused)) from refused
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
            LanguageModelError: key, model or address refused, the quota used up, or the server no
                longer reachable after all retries.
        """
        if not self._checked:
            self.check()
        results: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        stop = threading.Event()
        todo = iter(enumerate(requests))
        # A place is free again when its answer was taken and, by then, kept: what a kill can cost
        # is never more than ``concurrency`` answers.
        places = threading.Semaphore(self.concurrency)

        def work() -> None:
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

        # Daemons: an interrupted program does not wait for answers that nobody will read.
        # A few more than places: they prepare images while others wait for answers.
        ahead = 4 if any(request.images for request in requests) else 0
        threads = min(self.concurrency + ahead, len(requests))
        for _ in range(threads):
            threading.Thread(target=work, daemon=True).start()
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

    def _ask(
        self, request: Request, content: list[dict[str, Any]], stop: threading.Event
    ) -> Answer:
        """Send one request until it is answered.

        Raises:
            LanguageModelError: this request cannot be answered; _Stopped: none can.
        """
        error = self._openai
        tries = 0
        while True:
            sent = dict(self._sent)
            delay: float | None = None
            try:
                return self._answer(self._create(request, content, sent))
            except error.APITimeoutError as failed:
                problem = LanguageModelError(
                    f"{self._about(request)}: no answer within {self.timeout:g} s; raise "
                    "--language_model.timeout, or lower --language_model.concurrency"
                )
                problem.__cause__ = failed
            except error.APIConnectionError as failed:
                if tries >= self.retries:
                    raise _Stopped(self._unreachable(failed)) from failed
                problem = LanguageModelError(self._unreachable(failed))
            except error.APIStatusError as failed:
                if self._refused_parameter(failed, sent):
                    continue
                problem = self._status_problem(failed, request)
                delay = _retry_after(failed.response.headers)
                if delay is not None and delay > _LONGEST_RETRY_AFTER:
                    raise _Stopped(
                        f"{self.base_url}: asks to wait {delay:.0f} s ({self._short(failed)}); run "
                        "the same command again then: answers so far are kept"
                    ) from failed
            except (error.OpenAIError, *_MALFORMED) as failed:
                # A proxy's page, a cut-off reply, an answer without a message.
                problem = LanguageModelError(
                    f"{self._about(request)}: {self.base_url} sent a reply that is none "
                    f"({self._short(failed)}); is this an OpenAI-compatible address, ending in /v1?"
                )
                problem.__cause__ = failed
            if tries >= self.retries:
                raise problem
            tries += 1
            with self._lock:
                self.usage.retries += 1
            self._pause(tries, delay, stop)

    def _create(self, request: Request, content: list[dict[str, Any]], sent: dict[str, Any]) -> Any:
        values: dict[str, Any] = {
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": request.max_tokens,
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
        choice = reply.choices[0]
        message, usage = choice.message, reply.usage
        text = message.content
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(part.get("text", "") for part in text)
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

    def _refused_parameter(self, failed: Any, sent: dict[str, str | None]) -> bool:
        """Whether the server refused an optional parameter that can be left out or renamed."""
        if failed.status_code not in (400, 404, 415, 422, 501):
            return False
        text = f"{failed.param or ''} {failed.message}".lower()
        for name in _OPTIONAL:
            key = sent[name]
            words = _SCHEMA_WORDS if name == "response_format" else (key or "",)
            if key is None or not any(word and word in text for word in words):
                continue
            with self._lock:
                if self._sent[name] == key:  # no other thread was first
                    renamed = name == key == "max_tokens" and "max_completion_tokens" in text
                    self._sent[name] = "max_completion_tokens" if renamed else None
            return True
        return False

    def _status_problem(self, failed: Any, request: Request) -> LanguageModelError:
        """Return the error of one request; raise what no request can get past, or no retry."""
        status, text = failed.status_code, self._short(failed)
        if status in (401, 403):
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
        problem = LanguageModelError(
            f"{self._about(request)}: the server answered {status} ({text})"
        )
        problem.__cause__ = failed
        if status < 500 and status not in _RETRIED_STATUS:
            raise problem
        return problem

    def _pause(self, tries: int, retry_after: float | None, stop: threading.Event) -> None:
        if retry_after is not None:
            # A little more than asked, at random: else all come back at the same moment.
            delay = retry_after * (1 + 0.1 * self._random.random())
        else:
            longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(tries - 1, 30))
            delay = longest * (0.5 + 0.5 * self._random.random())
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
        text = str(error)
        text = self._secrets.sub("***", text) if self._secrets else text
        text = " ".join(printable(text).split()) or type(error).__name__
        return text if len(text) <= 160 else f"{text[:160]}..."

    def _unreachable(self, failed: Exception) -> str:
        reason = failed.__cause__ or failed
        return (
            f"{self.base_url}: the server cannot be reached ({self._short(reason)}); start it, or "
            "set --language_model.base_url or OPENAI_BASE_URL to its address (usually ending in "
            "/v1); answers so far are kept"
        )

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


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait: ``Retry-After`` in seconds or as a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        if date is None:
            return None
        seconds = email.utils.mktime_tz(date) - time.time()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _userinfo(url: str) -> str:
    """Return "name:password" of an address, without a parser: it may not be a proper one."""
    found = re.match(r"(?:[a-zA-Z][\w+.-]*://)?(.*)@", url, re.DOTALL)
    return found[1] if found else ""


def _secrets(key: str, userinfo: str) -> re.Pattern[str] | None:
    """Match what no message may show: the key, and name and password in any form they are sent."""
    password = userinfo.partition(":")[2]
    plain = urllib.parse.unquote(userinfo)
    basic = base64.b64encode(plain.encode(errors="replace")).decode()
    found = {key, userinfo, password, plain, plain.partition(":")[2], basic if userinfo else ""}
    # Placeholders such as "x" count as whole words only: the letter may be in every message.
    words = [
        re.escape(item) if len(item) >= 8 else rf"(?<!\w){re.escape(item)}(?!\w)"
        for item in sorted(found - {""}, key=len, reverse=True)
    ]
    return re.compile("|".join(words)) if words else None
