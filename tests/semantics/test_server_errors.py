"""What becomes of servers that refuse, complain or talk nonsense."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics.journal import Journal, JournaledModel
from dvla_fast.semantics.language_models.base import Answer, Request, answer_all
from dvla_fast.semantics.language_models.openai_server import OpenAIServer
from dvla_fast.semantics.language_models.server_errors import words
from tests.semantics.loopback import Reply, ask, echo, model, prompt_of, serve

SCHEMA = {"type": "object"}
_PLACE = {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs not permitted"}


def refusing(parameter: str, status: int, body: Any) -> Any:
    """A server that sends this body to requests with a parameter."""
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()

    def behave(request: dict[str, Any], number: int) -> Reply:
        return Reply(status=status, raw=raw) if parameter in request else echo(request, number)

    return behave


@pytest.mark.parametrize(
    ("parameter", "status", "body"),
    [
        ("temperature", 422, {"error": "Input error: `temperature` must be strictly positive"}),
        ("seed", 422, {"detail": [_PLACE]}),
        ("seed", 422, {"object": "error", "message": {"detail": [_PLACE]}, "param": None}),
        ("response_format", 400, {"detail": "response_format json_schema is not supported"}),
        ("seed", 400, [{"error": {"code": 400, "message": 'Unknown name "seed": no such field.'}}]),
        ("seed", 400, "unknown field: seed"),
        ("response_format", 500, {"error": {"message": "failed to parse grammar"}}),
    ],
)
def test_refusals_are_understood_in_every_form(parameter: str, status: int, body: Any) -> None:
    with serve(refusing(parameter, status, body)) as server:
        language_model = model(server, concurrency=1)
        requests = [Request(name, schema=SCHEMA) for name in "ab"]
        assert [answer.text for answer in answer_all(language_model, requests)] == [
            "about a", "about b"
        ]  # fmt: skip
    assert [parameter in request for request in server.requests] == [True, False, False]
    optional = {"temperature", "seed", "response_format", "max_tokens"} - {parameter}
    assert optional <= set(server.requests[-1])


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"error": "no images, please"}, "no images, please"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too small"}]}, "body.n: too small"),
        ({"status": 400, "error": "Bad Request", "message": "no"}, "Bad Request: no"),
        ({"error": {"message": "from afar", "metadata": {"raw": "why"}}}, "from afar: why"),
        ({"code": 7}, '{"code": 7}'),
        ("plain text", "plain text"),
    ],
)
def test_messages_hold_the_words_of_the_server(body: Any, found: str) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    with serve(lambda *_: Reply(status=418, raw=raw)) as server:
        (error,) = ask(server, "Crow")
    assert f"the server answered 418 (Error code: 418 - {found})" in str(error)


def test_words_of_bodies_that_say_nothing() -> None:
    for body in ({}, [], None, 3, {"error": None}, {"error": {"code": 1}}):
        assert words(body) == ""


def test_body_of_any_form_is_short_and_shows_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET/123")
    raw = b'{"detail": "sk-SECRET\\/123 ' + b"x" * 100_000 + b'"}'  # as PHP writes a slash
    with serve(lambda *_: Reply(status=418, raw=raw)) as server:
        (error,) = ask(server, "Crow")
    assert "*** xxx" in str(error)
    assert "SECRET" not in str(error)
    assert len(str(error)) < 400


@pytest.mark.parametrize(
    "error",
    [{"message": "Rate limit exceeded: per day", "code": 429}, "Rate limit exceeded: per day"],
)
def test_error_with_status_200(error: Any) -> None:
    raw = json.dumps({"error": error}).encode()
    with serve(lambda *_: Reply(raw=raw)) as server:
        (found,) = ask(server, "Crow", retries=1)
    assert "sent an error in the place of an answer (Rate limit exceeded: per day)" in str(found)


def test_page_in_the_place_of_an_answer_is_quoted() -> None:
    page = Reply(raw=b"<html>Log in first</html>", headers={"Content-Type": "text/html"})
    with serve(lambda *_: page) as server:
        (found,) = ask(server, "Crow", retries=0)
    assert "sent a reply that is none (<html>Log in first</html>)" in str(found)


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_answer_that_is_thinking_alone_is_no_broken_reply(finish: str) -> None:
    with serve(lambda *_: Reply(None, finish=finish)) as server:
        (answer,) = ask(server, "Crow")
    assert (answer.text, answer.finish) == ("", finish)
    assert len(server.requests) == 1


def test_length_of_answers_can_be_set() -> None:
    with serve(echo) as server:
        longer = model(server, max_tokens=4096)
        answer_all(longer, [Request("a"), Request("b", max_tokens=9)])
        assert sorted(request["max_tokens"] for request in server.requests) == [9, 4096]
        assert longer.identity == {**model(server).identity, "max_tokens": 4096}
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        OpenAIServer("m", base_url="http://127.0.0.1:9/v1", max_tokens=0)


@pytest.mark.parametrize("status", [401, 403])
def test_key_that_may_not_list_models(status: int) -> None:
    with serve(echo) as server:
        server.listing = Reply(status=status)
        assert ask(server, "a")[0].text == "about a"
        with pytest.raises(LanguageModelError, match="refuses the key"):
            model(server, model="").check()


def test_403_after_an_answer_fails_that_class_alone() -> None:
    def behave(request: dict[str, Any], number: int) -> Reply:
        return Reply(status=403) if prompt_of(request) == "b" else echo(request, number)

    with serve(behave) as server:
        found = ask(server, *"abc", concurrency=1)
    assert [getattr(answer, "text", None) for answer in found] == ["about a", None, "about c"]
    assert "candidates of 'b': the server answered 403" in str(found[1])


def test_moderation_is_no_matter_of_the_key() -> None:
    flagged = Reply(status=403, error={"message": "Your input was flagged (moderation)"})

    def behave(request: dict[str, Any], number: int) -> Reply:
        return flagged if prompt_of(request) == "a" else echo(request, number)

    with serve(behave) as server:
        found = ask(server, *"ab", concurrency=1)
    assert "Your input was flagged" in str(found[0])
    assert found[1].text == "about b"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ALL_PROXY", "socks://me:hunter2@127.0.0.1:9", "nknown scheme for proxy"),
        ("SSL_CERT_FILE", "/nonexistent.pem", "No such file"),
    ],
)
def test_environment_that_allows_no_connection(
    name: str, value: str, reason: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(name, value)
    with pytest.raises(LanguageModelError) as caught:
        OpenAIServer("m", base_url="http://127.0.0.1:9/v1")
    message = str(caught.value)
    assert "is no address" not in message
    assert reason in message
    assert message.endswith(f"; check the environment: it sets {name}")
    assert "hunter2" not in message


def test_wrong_address_is_still_called_one(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(LanguageModelError, match=r"is no address; give .*/v1$"):
        OpenAIServer("m", base_url="http://127.0.0.1:port/v1")


def test_proxy_is_named_where_the_server_cannot_be_reached(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    asked = OpenAIServer("m", base_url="http://server.invalid/v1")
    with pytest.raises(LanguageModelError, match="the environment sets HTTP_PROXY") as caught:
        asked.check()
    environment.delenv("HTTP_PROXY")
    with pytest.raises(LanguageModelError) as caught:
        OpenAIServer("m", base_url="http://127.0.0.1:9/v1").check()
    assert "environment" not in str(caught.value)


@pytest.mark.parametrize("value", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_retry_after_is_never_less_than_our_own_wait(value: str) -> None:
    waits: list[float] = []
    busy = Reply(status=429, headers={"Retry-After": value})
    with serve(lambda *_: busy) as server:
        list(model(server, waits, retries=3).answers([Request("a")]))
    for wait, longest in zip(waits, (1, 2, 4), strict=True):
        assert longest / 2 <= wait <= longest


NONSENSE = [
    Reply(raw=b"<html>portal</html>", headers={"Content-Type": "text/html"}),
    Reply(raw=b"data: [DONE]\n\n", headers={"Content-Type": "text/event-stream"}),
    Reply(raw=b""),
    Reply(status=500, error={"message": "image input is not supported"}),
]


@pytest.mark.parametrize("reply", NONSENSE)
def test_nonsense_from_the_first_request_on_ends_the_work(reply: Reply) -> None:
    found: list[int] = []
    with serve(lambda *_: reply) as server:
        work = model(server, concurrency=1, retries=1).answers([Request(str(i)) for i in range(50)])
        with pytest.raises(LanguageModelError) as caught:
            found.extend(index for index, _ in work)
    assert found == list(range(16))
    assert 32 <= len(server.requests) <= 34  # the next one may be under way
    quoted = {0: "portal", 1: r"\[DONE\]", 3: "image input is not supported"}
    assert re.search(quoted.get(NONSENSE.index(reply), "reply that is none"), str(caught.value))
    assert re.search(
        "first 16 requests .* ended alike: .*answers so far are kept", str(caught.value)
    )


@pytest.mark.parametrize("status", [500, 403])
def test_answers_kept_from_before_count(status: int, tmp_path: Path) -> None:
    """A build that goes on asks only about what has failed: neither server nor key is to blame."""
    requests = [Request(f"{kind} {i}") for kind in ("good", "bad") for i in range(20)]

    def behave(request: dict[str, Any], number: int) -> Reply:
        failing = prompt_of(request).startswith("bad")
        return Reply(status=status) if failing else echo(request, number)

    with serve(behave) as server:
        for _ in range(2):
            journal = Journal(tmp_path / "answers.jsonl")
            asked = JournaledModel(model(server, concurrency=1, retries=0), journal)
            found = dict(asked.answers(requests))
            journal.close()
            answered = [index for index, answer in found.items() if isinstance(answer, Answer)]
            assert answered == list(range(20))
            assert len(found) == 40


def test_few_failures_or_any_answer_do_not_end_the_work() -> None:
    requests = [Request(str(i)) for i in range(40)]
    with serve(lambda *_: NONSENSE[3]) as server:  # fewer than 16 of them: each for itself
        assert len(list(model(server, retries=0).answers(requests[:15]))) == 15

    def behave(request: dict[str, Any], number: int) -> Reply:
        return NONSENSE[3] if number % 20 else echo(request, number)

    with serve(behave) as server:
        found = dict(model(server, concurrency=1, retries=0).answers(requests))
    assert [index for index, answer in found.items() if isinstance(answer, Answer)] == [0, 20]

    def mixed(request: dict[str, Any], number: int) -> Reply:
        return Reply(status=500 + number % 2)

    with serve(mixed) as server:  # different ones: perhaps a server that is starting
        assert len(list(model(server, retries=0, concurrency=1).answers(requests))) == 40


def test_answers_under_way_are_kept_when_nonsense_ends_the_work() -> None:
    given_up = threading.Event()

    def behave(request: dict[str, Any], number: int) -> Reply:
        if prompt_of(request) == "slow":
            return Reply("good", hold=given_up)
        return NONSENSE[3]

    found: dict[int, Any] = {}
    with serve(behave) as server:
        requests = [Request("slow"), *(Request(str(i)) for i in range(40))]
        work: Iterator[tuple[int, Any]] = model(server, concurrency=2, retries=0).answers(requests)

        def take() -> None:
            for index, answer in work:
                found[index] = answer
                if len(found) == 16:
                    given_up.set()

        with pytest.raises(LanguageModelError, match="ended alike"):
            take()
    assert found[0].text == "good"


def test_limit_that_is_too_large_is_not_dropped() -> None:
    message = (
        "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context "
        "length is 1500 tokens and your request has 600 input tokens"
    )

    def behave(request: dict[str, Any], number: int) -> Reply:
        long = prompt_of(request) == "long"
        return Reply(status=400, error={"message": message}) if long else echo(request, number)

    with serve(behave) as server:
        found = ask(server, "long", "a", concurrency=1)
    assert "is too large: 1024" in str(found[0])
    assert "; lower --language_model.max_tokens" in str(found[0])
    assert [request.get("max_tokens") for request in server.requests] == [1024, 1024]


def test_error_that_quotes_the_question_drops_nothing() -> None:
    quoted = "this was blocked: 'seed, temperature, max_tokens: a structured answer'"

    def behave(request: dict[str, Any], number: int) -> Reply:
        bad = prompt_of(request) == "bad"
        return Reply(status=400, error={"message": quoted}) if bad else echo(request, number)

    with serve(behave) as server:
        language_model = model(server, concurrency=1)
        requests = [Request("bad", schema=SCHEMA), Request("a", schema=SCHEMA)]
        found = dict(language_model.answers(requests))
    assert "this was blocked" in str(found[0])
    sent = server.requests[-1]
    assert {"seed", "temperature", "max_tokens", "response_format"} <= set(sent)
    assert language_model.structured


def test_parameters_are_found_as_whole_words() -> None:
    blocked = Reply(status=400, error={"message": "Seedeater: unstructured, no temperatures"})
    with serve(lambda *_: blocked) as server:
        list(model(server).answers([Request("a", schema=SCHEMA)]))
    assert len(server.requests) == 1


def test_counts_of_tokens_that_are_no_numbers() -> None:
    message = {"role": "assistant", "content": "x"}
    body: dict[str, Any] = {"choices": [{"message": message, "finish_reason": "stop"}]}
    for sent, read in (("5", 5), (5.5, 5), ("many", None), (float("nan"), None)):
        body["usage"] = {"prompt_tokens": sent, "completion_tokens": sent}
        raw = json.dumps(body).encode()
        with serve(lambda *_, raw=raw: Reply(raw=raw)) as server:
            language_model = model(server)
            (answer,) = answer_all(language_model, [Request("a")])
        assert (answer.input_tokens, answer.output_tokens) == (read, read)
        assert language_model.usage.input_tokens == (read or 0)
