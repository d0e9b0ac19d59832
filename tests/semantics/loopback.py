"""A server that speaks OpenAI's chat protocol on the loopback interface, with injected faults."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from dvla_fast.semantics.language_models.base import Request
from dvla_fast.semantics.language_models.openai_server import OpenAIServer


@dataclass(frozen=True)
class Reply:
    """What the server sends: an answer's text, or another status, raw bytes, after a hold."""

    text: str | None = ""
    status: int = 200
    finish: str | None = "stop"
    refusal: str | None = None
    error: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    hold: threading.Event | None = None
    usage: bool = True


Behaviour = Callable[[dict[str, Any], int], Reply]


class Loopback:
    """The running server: its address, and the requests that came.

    ``listing``: what it says in the place of its models.
    """

    def __init__(self, behave: Behaviour, models: tuple[str, ...], key: str) -> None:
        self.behave, self.models, self.key = behave, models, key
        self.requests: list[dict[str, Any]] = []
        self.under_way = 0
        self.most = 0
        self.lock = threading.Lock()
        self.url = ""
        self.listing: Reply | None = None

    def prompts(self) -> list[str]:
        return [prompt_of(request) for request in self.requests]


def prompt_of(request: dict[str, Any]) -> str:
    content = request["messages"][0]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def images_of(request: dict[str, Any]) -> list[str]:
    content = request["messages"][0]["content"]
    if isinstance(content, str):
        return []
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


def model(server: Loopback, waits: list[float] | None = None, **options: Any) -> OpenAIServer:
    kept: list[float] = [] if waits is None else waits
    return OpenAIServer(
        options.pop("model", "tiny-vl"), base_url=server.url, wait=kept.append, **options
    )


def ask(server: Loopback, *prompts: str, **options: Any) -> list[Any]:
    language_model = model(server, **options)
    requests = [Request(prompt, (), "candidates", prompt) for prompt in prompts]
    found = dict(language_model.answers(requests))
    return [found[index] for index in range(len(prompts))]


def echo(request: dict[str, Any], number: int) -> Reply:
    return Reply(f"about {prompt_of(request)}")


def first(reply: Reply, then: Callable[[dict[str, Any], int], Reply] = echo) -> Any:
    """A fault on the first request only."""
    return lambda request, number: reply if number == 0 else then(request, number)


def _body(reply: Reply, request: dict[str, Any]) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": f"injected {reply.status}", "type": "x", **reply.error}}
    message = {"role": "assistant", "content": reply.text, "refusal": reply.refusal}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": f"{request.get('model')}-2026",
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
    }
    if reply.usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return body


@contextmanager
def serve(
    behave: Behaviour, models: tuple[str, ...] = ("tiny-vl",), key: str = ""
) -> Iterator[Loopback]:
    """Run the server; ``behave(request, its number from 0)`` decides what it sends."""
    state = Loopback(behave, models, key)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            if state.listing is not None:
                self.send(state.listing, {})
                return
            if state.key and self.headers["Authorization"] != f"Bearer {state.key}":
                self.send(Reply(status=401), {})
                return
            data = [{"id": name, "object": "model"} for name in state.models]
            self.write(200, json.dumps({"object": "list", "data": data}).encode(), {})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.endswith("/chat/completions"):
                self.send(Reply(status=404), request)
                return
            if state.key and self.headers["Authorization"] != f"Bearer {state.key}":
                self.send(Reply(status=401), request)
                return
            with state.lock:
                number = len(state.requests)
                state.requests.append(request)
                state.under_way += 1
                state.most = max(state.most, state.under_way)
            try:
                reply = state.behave(request, number)
                if reply.hold is not None:
                    reply.hold.wait(10)
            finally:
                with state.lock:
                    state.under_way -= 1
            self.send(reply, request)

        def send(self, reply: Reply, request: dict[str, Any]) -> None:
            body = json.dumps(_body(reply, request)).encode()
            self.write(reply.status, body if reply.raw is None else reply.raw, reply.headers)

        def write(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            try:
                self.send_response(status)
                sent = {"Content-Type": "application/json", **headers}
                for name, value in {"Content-Length": str(len(body)), **sent}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True
        connections: ClassVar[list[socket.socket]] = []

        def process_request(self, request: Any, client_address: Any) -> None:
            self.connections.append(request)
            super().process_request(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        for connection in server.connections:  # else those kept alive would still be served
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
