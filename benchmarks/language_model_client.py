"""Throughput of the OpenAI-compatible client against a server's own limit, on this machine.

A server on the loopback interface takes a fixed time for each request and works on 16 at once, so
it can answer 16 / time requests a second and no more. The client asks 16 at a time, with and
without the journal that a build keeps (a flushed line on the disk for each answer).

    python -m benchmarks.language_model_client
    python -m benchmarks.language_model_client --service 0.5 --requests 320 --output record.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

SLOTS = 16


async def _serve(service: float, slots: int, port: Any) -> None:
    free = asyncio.Semaphore(slots)
    text = json.dumps({"attributes": [f"attribute number {i}" for i in range(16)]})
    answer = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "fixed",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
    models = {"object": "list", "data": [{"id": "fixed", "object": "model"}]}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode().lower().split("\r\n")
            length = [int(line.split(":")[1]) for line in lines if line.startswith("content-len")]
            await reader.readexactly(length[0] if length else 0)
            body = models
            if lines[0].startswith("post"):
                async with free:
                    await asyncio.sleep(service)
                body = answer
            data = json.dumps(body).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )

    async def quietly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(quietly, "127.0.0.1", 0, backlog=256)
    port.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _run_server(service: float, slots: int, port: Any) -> None:
    asyncio.run(_serve(service, slots, port))


def measure(service: float, requests: int, side: int, repeats: int) -> dict[str, Any]:
    """Return requests a second with and without the journal, and the server's limit."""
    import numpy as np

    from dvla_fast.semantics.journal import Journal, JournaledModel
    from dvla_fast.semantics.language_models import OpenAIServer, Request, ShownImage

    receive, send = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(
        target=_run_server, args=(service, SLOTS, send), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{receive.recv()}/v1"
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    shown = (ShownImage("image", pixels),) if side else ()
    limit = SLOTS / service
    result: dict[str, Any] = {
        "service_seconds": service, "slots": SLOTS, "requests": requests, "image_side": side,
        "limit_per_second": limit,
    }  # fmt: skip
    try:
        for kept in (False, True):
            rates = []
            for repeat in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    model: Any = OpenAIServer("fixed", base_url=url, concurrency=SLOTS)
                    asked = [Request(f"{repeat} {i}", shown) for i in range(requests)]
                    list(model.answers(asked[:SLOTS]))  # connections are open, code is loaded
                    if kept:
                        model = JournaledModel(model, Journal(Path(folder) / "journal.jsonl"))
                    start = time.perf_counter()
                    done = sum(1 for _ in model.answers(asked))
                    rates.append(done / (time.perf_counter() - start))
            rate = sorted(rates)[len(rates) // 2]
            name = "with_journal" if kept else "client"
            result[name] = {"per_second": rate, "share_of_limit": rate / limit}
    finally:
        server.kill()
        server.join()
    return result


def main() -> None:
    """Measure and print; see the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--service", type=float, nargs="+", default=[0.1, 0.25, 1.0])
    parser.add_argument("--requests", type=int, default=480)
    parser.add_argument("--side", type=int, default=0, help="side of an image sent with each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="", help="JSON file of the record")
    options = parser.parse_args()
    rows = [
        measure(service, options.requests, options.side, options.repeats)
        for service in options.service
    ]
    for row in rows:
        print(
            f"{row['service_seconds']:5.2f} s a request, limit {row['limit_per_second']:6.1f}/s: "
            + ", ".join(
                f"{name.replace('_', ' ')} {row[name]['per_second']:6.1f}/s "
                f"({row[name]['share_of_limit']:.3f} of it)"
                for name in ("client", "with_journal")
            )
        )
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
