"""The OpenAI-compatible back end against a loopback server with injected faults."""

from __future__ import annotations

import base64
import builtins
import io
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dvla_fast.errors import LanguageModelError, MissingDependencyError
from dvla_fast.semantics.language_models import server_errors
from dvla_fast.semantics.language_models.base import Answer, Request, ShownImage, answer_all
from dvla_fast.semantics.language_models.openai_server import OpenAIServer
from tests.semantics.loopback import (
    Reply,
    ask,
    echo,
    first,
    images_of,
    model,
    prompt_of,
    serve,
)

SCHEMA = {"type": "object", "properties": {"attributes": {"type": "array"}}}


def test_answers_many_requests_side_by_side() -> None:
    everybody = threading.Barrier(16, timeout=10)  # broken unless 16 requests are there at once

    def behave(request: dict[str, Any], number: int) -> Reply:
        everybody.wait()
        return echo(request, number)

    with serve(behave) as server:
        language_model = model(server)
        prompts = [f"class {i}" for i in range(48)]
        answers = answer_all(language_model, [Request(prompt) for prompt in prompts])
    assert [answer.text for answer in answers] == [f"about {prompt}" for prompt in prompts]
    assert answers[0] == Answer("about class 0", "stop", 100, 10, "tiny-vl-2026")
    assert server.most == 16
    usage = language_model.usage
    assert (usage.answers, usage.input_tokens, usage.output_tokens) == (48, 4800, 480)
    assert usage.cost(2.0, 10.0) == pytest.approx((4800 * 2 + 480 * 10) / 1e6)


def test_what_is_sent(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "bird.png")
    shown = (
        ShownImage("bird.png", tmp_path / "bird.png", max_side=200),
        ShownImage("small", photo[:32, :32]),
    )
    with serve(echo) as server:
        language_model = model(server, temperature=0.0, seed=7)
        answer_all(language_model, [Request("What?", shown, "candidates", "a", SCHEMA, 99)])
    (request,) = server.requests
    assert request["temperature"] == 0.0
    assert request["seed"] == 7
    assert request["max_tokens"] == 99
    assert request["response_format"]["json_schema"]["schema"] == SCHEMA
    large, small = images_of(request)
    decoded = []
    for url, kind in ((large, "jpeg"), (small, "png")):
        head, data = url.split(",")
        assert head == f"data:image/{kind};base64"
        decoded.append(Image.open(io.BytesIO(base64.b64decode(data))))
    assert decoded[0].size == (200, 100)
    assert np.array_equal(np.asarray(decoded[1]), photo[:32, :32])  # PNG loses nothing
    assert request["messages"][0]["content"][-1] == {"type": "text", "text": "What?"}


def test_text_alone_is_sent_as_plain_text() -> None:
    with serve(echo) as server:
        ask(server, "hello")
    assert server.requests[0]["messages"][0]["content"] == "hello"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_retries_with_growing_waits(status: int) -> None:
    def behave(request: dict[str, Any], number: int) -> Reply:
        return Reply(status=status) if number < 4 else echo(request, number)

    waits: list[float] = []
    with serve(behave) as server:
        language_model = model(server, waits)
        assert answer_all(language_model, [Request("a")])[0].text == "about a"
    assert language_model.usage.retries == 4
    for wait, longest in zip(waits, (1, 2, 4, 8), strict=True):
        assert longest / 2 <= wait <= longest


def test_waits_are_bounded_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with serve(lambda request, number: Reply(status=500)) as server:
        language_model = model(server, waits, retries=12)
        (_, error) = next(iter(language_model.answers([Request("a", (), "candidates", "Crow")])))
    assert isinstance(error, LanguageModelError)
    assert "candidates of 'Crow': the server answered 500 (Error code: 500" in str(error)
    assert len(server.requests) == 13
    assert max(waits) <= 60
    assert min(waits[7:]) >= 30
    assert len({round(wait, 6) for wait in waits[7:]}) > 1


@pytest.mark.parametrize("value", ["7", "date"])
def test_retry_after_is_respected(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value == "date":
        monkeypatch.setattr(server_errors.time, "time", lambda: 1445412480.0 - 7)
        value = "Wed, 21 Oct 2015 07:28:00 GMT"
    waits: list[float] = []
    with serve(first(Reply(status=429, headers={"Retry-After": value}))) as server:
        answer_all(model(server, waits), [Request("a")])
    (wait,) = waits
    assert 7 <= wait <= 7.7


def test_retry_after_of_hours_stops_the_work() -> None:
    waits: list[float] = []
    with serve(lambda *_: Reply(status=429, headers={"Retry-After": "9000"})) as server:
        with pytest.raises(LanguageModelError, match=r"asks to wait 9000 s.*same command again"):
            answer_all(model(server, waits, concurrency=1), [Request("a"), Request("b")])
        assert len(server.requests) == 1
    assert waits == []


def test_slow_server_times_out_and_is_asked_again() -> None:
    never = threading.Event()
    with serve(first(Reply("late", hold=never))) as server:
        language_model = model(server, timeout=0.2)
        assert answer_all(language_model, [Request("a")])[0].text == "about a"
        never.set()
    assert language_model.usage.retries == 1


def test_always_slow_server() -> None:
    never = threading.Event()
    with serve(lambda *_: Reply("late", hold=never)) as server:
        (error,) = ask(server, "Crow", timeout=0.1, retries=1)
        never.set()
    assert "candidates of 'Crow': no answer within 0.1 s; raise --language_model.timeout" in str(
        error
    )


@pytest.mark.parametrize(
    "raw", [b'{"choices": [{"mess', b"<html>proxy</html>", b"{}", b'{"choices": []}', b"null"]
)
def test_reply_that_is_none(raw: bytes) -> None:
    for headers in ({}, {"Content-Type": "text/html"}):
        with serve(first(Reply(raw=raw, headers=headers))) as server:
            assert ask(server, "a")[0].text == "about a"
        with serve(lambda *_, h=headers: Reply(raw=raw, headers=h)) as server:
            (error,) = ask(server, "Crow", retries=1)
        assert "candidates of 'Crow'" in str(error)
        assert "sent a reply that is none" in str(error)


def test_message_without_text() -> None:
    with serve(first(Reply(None, finish=None))) as server:
        assert ask(server, "a")[0].text == "about a"


def test_refusal_and_cut_answer_are_told_apart() -> None:
    replies = {
        "plain": Reply(None, refusal="I'm sorry, I can't help with that."),
        "filter": Reply("", finish="content_filter"),
        "cut": Reply('{"attributes": ["lo', finish="length"),
    }
    with serve(lambda request, _: replies[prompt_of(request)]) as server:
        plain, filtered, cut = ask(server, "plain", "filter", "cut")
    assert (plain.finish, plain.text) == ("refusal", "I'm sorry, I can't help with that.")
    assert (filtered.finish, filtered.text) == ("refusal", "")
    assert (cut.finish, cut.text) == ("length", '{"attributes": ["lo')


def test_server_that_counts_no_tokens() -> None:
    with serve(lambda *_: Reply("x", usage=False)) as server:
        language_model = model(server)
        (answer,) = answer_all(language_model, [Request("a")])
    assert answer.input_tokens is None
    assert language_model.usage.uncounted == 1


def test_falls_back_where_json_schema_is_refused() -> None:
    def behave(request: dict[str, Any], number: int) -> Reply:
        if "response_format" in request:
            return Reply(status=400, error={"message": "json_schema is not supported here"})
        return echo(request, number)

    waits: list[float] = []
    with serve(behave) as server:
        language_model = model(server, waits, concurrency=1)
        assert language_model.structured
        requests = [Request(name, schema=SCHEMA) for name in "abc"]
        assert [a.text for a in answer_all(language_model, requests)] == [
            "about a", "about b", "about c"
        ]  # fmt: skip
    assert not language_model.structured
    assert len(server.requests) == 4  # refused once, never sent again
    assert waits == []


def test_parameters_that_a_server_refuses_are_left_out_or_renamed() -> None:
    refusals = {
        "seed": "Unknown parameter: 'seed'",
        "temperature": "Unsupported value: 'temperature' does not support 0",
        "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead",
    }

    def behave(request: dict[str, Any], number: int) -> Reply:
        for name, message in refusals.items():
            if name in request:
                return Reply(status=400, error={"message": message, "param": name})
        return echo(request, number)

    with serve(behave) as server:
        assert all(answer.text for answer in ask(server, *"abcdefgh"))
    assert server.requests[-1]["max_completion_tokens"] == 1024
    assert "seed" not in server.requests[-1]


def test_bad_request_fails_that_class_alone_without_retry() -> None:
    def behave(request: dict[str, Any], number: int) -> Reply:
        long = prompt_of(request) == "long"
        return Reply(status=400, error={"message": "too long"}) if long else echo(request, number)

    with serve(behave) as server:
        good, error = ask(server, "a", "long")
    assert good.text == "about a"
    assert "candidates of 'long': the server answered 400" in str(error)
    assert len(server.requests) == 2


def test_unreadable_image_fails_that_class_alone(tmp_path: Path) -> None:
    bad = ShownImage("bad.jpg", tmp_path / "bad.jpg")
    with serve(echo) as server:
        found = dict(model(server).answers([Request("a", (bad,)), Request("b")]))
    assert isinstance(found[0], LanguageModelError)
    assert "bad.jpg" in str(found[0])
    assert found[1].text == "about b"


def test_missing_key_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(LanguageModelError, match="no key: set the environment variable OPENAI_API"):
        OpenAIServer("gpt")
    monkeypatch.setenv("MY_KEY", "x")
    assert OpenAIServer("gpt", api_key_env="MY_KEY").base_url == "https://api.openai.com/v1"


def test_key_and_address_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(echo, key="secret-1") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret-1")
        assert answer_all(OpenAIServer("tiny-vl"), [Request("a")])[0].text == "about a"
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(LanguageModelError, match="OPENAI_API_KEY is not set"):
            OpenAIServer().check()
        monkeypatch.setenv("OPENAI_API_KEY", "secret-2")
        with pytest.raises(LanguageModelError, match="holds another one") as caught:
            answer_all(OpenAIServer("tiny-vl"), [Request("a")])
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1  # that were let in


@pytest.mark.parametrize("key", ["sk-SECRET\n123", "sk-SECRET\x07", "sk-SECRÉT", "sk-SECRET\udcff"])
def test_key_that_cannot_be_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(LanguageModelError, match="variable MY_KEY holds characters") as caught:
        OpenAIServer("tiny-vl", base_url="http://127.0.0.1:9/v1", api_key_env="MY_KEY")
    assert "SECR" not in str(caught.value)


def test_space_around_a_key_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-SECRET123\n")
    with serve(echo, key="sk-SECRET123") as server:
        assert answer_all(model(server), [Request("a")])[0].text == "about a"


@pytest.mark.parametrize("status", [400, 401, 402, 404, 418])
def test_key_that_a_server_echoes_is_not_shown(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET123")
    # Where a long message is cut, at another place for each release of openai: no part of the key
    # may remain.
    cut = ["x" * length + "sk-SECRET123" for length in range(105, 150, 5)]
    for text in ("wrong: Bearer sk-SECRET123", "Basic bWU6aHVudGVyMg==", *cut):
        reply = Reply(status=status, error={"message": text})
        with serve(lambda *_, reply=reply: reply) as server:
            url = server.url.replace("://", "://me:hunter2@")
            asked = OpenAIServer("m", base_url=url, retries=0).answers([Request("a")])
            try:
                message = str(next(asked)[1])
            except LanguageModelError as error:
                message = str(error)
        assert "***" in message or text in cut
        assert not [part for part in ("SECR", "hunter2", "bWU6") if part in message], message


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@127.0.0.1:9/v1",
        "me:hunter2@127.0.0.1:9/v1",
        "http://me:hunter2/x@127.0.0.1:9/v1",
        "http://hunter2@127.0.0.1:9/v1",
    ],
)
def test_password_of_an_address_is_not_shown(url: str) -> None:
    with pytest.raises(LanguageModelError, match=r"\*\*\*@127.0.0.1:9/v1: ") as caught:
        answer_all(OpenAIServer("m", base_url=url, retries=0), [Request("a")])
    assert "hunter2" not in str(caught.value)


def test_unreachable_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    waits: list[float] = []
    language_model = OpenAIServer("m", base_url=url, retries=2, wait=waits.append)
    with pytest.raises(LanguageModelError, match=r"cannot be reached .*refused.*start it, or set"):
        language_model.check()
    with pytest.raises(LanguageModelError, match="cannot be reached"):
        answer_all(language_model, [Request("a")])
    assert waits == []  # a wrong address is no matter of patience


def test_server_that_goes_away_is_waited_for() -> None:
    waits: list[float] = []
    with serve(echo) as server:
        language_model = model(server, waits, retries=2)
        answer_all(language_model, [Request("a")])
    with pytest.raises(LanguageModelError, match=r"cannot be reached.*answers so far are kept"):
        answer_all(language_model, [Request("b")])
    assert len(waits) == 2


def test_server_lost_on_the_way_keeps_what_was_answered() -> None:
    def behave(request: dict[str, Any], number: int) -> Reply:
        return Reply(status=401) if number >= 3 else echo(request, number)

    found: list[int] = []
    with serve(behave) as server:
        work = model(server, concurrency=1).answers([Request(str(i)) for i in range(9)])
        with pytest.raises(LanguageModelError, match="refuses the key"):
            found.extend(index for index, _ in work)
    assert found == [0, 1, 2]
    assert len(server.requests) == 4


def test_answers_under_way_are_delivered_before_the_work_stops() -> None:
    refused = threading.Event()
    under_way = threading.Barrier(4, timeout=60)  # all, before the bad one is refused

    def behave(request: dict[str, Any], number: int) -> Reply:
        under_way.wait()
        if prompt_of(request) == "bad":
            refused.set()
            return Reply(status=401)
        return Reply("good", hold=refused)

    found: list[int] = []
    with serve(behave) as server:
        requests = [Request(name) for name in ("a", "b", "bad", "c")]
        work = model(server, concurrency=4).answers(requests)
        with pytest.raises(LanguageModelError, match="refuses the key"):
            found.extend(index for index, _ in work)
    assert sorted(found) == [0, 1, 3]


def test_requests_prepared_ahead_are_not_sent_once_the_work_stops() -> None:
    shown = (ShownImage("x", np.zeros((8, 8, 3), np.uint8)),)
    with serve(lambda *_: Reply(status=401)) as server:
        work = model(server, concurrency=1).answers([Request(str(i), shown) for i in range(9)])
        with pytest.raises(LanguageModelError, match="refuses the key"):
            next(work)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=404), "no model 'tiny-vl' here"),
        (Reply(status=429, error={"code": "insufficient_quota"}), "the quota is used up"),
        (Reply(status=402), "the quota is used up"),
    ],
)
def test_what_no_retry_can_help(reply: Reply, message: str) -> None:
    with serve(lambda *_: reply) as server:
        with pytest.raises(LanguageModelError, match=message):
            answer_all(model(server), [Request("a")])
        assert len(server.requests) == 1


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with serve(echo, models=("only",)) as server:
        answer_all(model(server, model=""), [Request("a")])
        assert server.requests[0]["model"] == "only"
    with (
        serve(echo, models=("one", "two")) as server,
        pytest.raises(LanguageModelError, match=r"which model.*it serves one, two"),
    ):
        model(server, model="").check()


def test_identity_says_what_changes_answers() -> None:
    with serve(echo) as server:
        assert model(server, seed=3).identity == {
            "backend": "openai", "model": "tiny-vl", "temperature": 0.0, "seed": 3
        }  # fmt: skip


def test_abandoned_work_stops() -> None:
    with serve(echo) as server:
        work = model(server, concurrency=1).answers([Request(str(i)) for i in range(1000)])
        next(work)
        work.close()
    assert len(server.requests) < 100


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "openai":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dvla-fast\[semantics\]'"):
        OpenAIServer("m", base_url="http://127.0.0.1:1/v1")
