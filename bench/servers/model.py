"""A model that costs little: an OpenAI-compatible server whose models' names say what they do.

    python -m bench.servers.model        prints its port, serves until it is ended

- `chunks-N-at-R`: N chunks, R a second; `chunks-N-at-0` all at once. Each chunk's text is the server's
  monotonic clock in ns and a comma, so whoever reads it on this machine knows how long it travelled.
- `tools-N`: N rounds that each call `bash` with `true`, then one chunk.

An answer begins when the request is there; `stream: false` gets it in one piece at its end.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from aiohttp import web

CHUNKS = re.compile(r"chunks-(\d+)-at-(\d+)$")
TOOLS = re.compile(r"tools-(\d+)$")
MAX_BODY_BYTES = 64 * 1024 * 1024


def _event(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "bench", "object": "chat.completion.chunk", "created": 0, "model": "bench"}
    return b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n"


def _last(n_output: int) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": n_output, "total_tokens": 10 + n_output}
    chunk = {"id": "bench", "object": "chat.completion.chunk", "created": 0, "model": "bench"}
    return b"data: " + json.dumps({**chunk, "choices": [], "usage": usage}).encode() + b"\n\n"


BEFORE, AFTER = _event({"content": "@"}).split(b"@")


def _stamped() -> bytes:
    return BEFORE + b"%d," % time.monotonic_ns() + AFTER


def _round(messages: list[dict[str, Any]]) -> int:
    """How many tool results came since the last message of a person."""
    n_results = 0
    for message in reversed(messages):
        if message["role"] == "tool":
            n_results += 1
        elif message["role"] == "user":
            break
    return n_results


async def _events(asked: dict[str, Any]) -> AsyncGenerator[bytes]:
    model: str = asked["model"]
    if tools := TOOLS.search(model):
        done = _round(asked["messages"])
        if done < int(tools[1]):
            call = {"index": 0, "id": f"call-{done}", "type": "function"}
            function = {"name": "bash", "arguments": '{"command": "true"}'}
            yield _event({"tool_calls": [{**call, "function": function}]})
            yield _event({}, "tool_calls")
        else:
            yield _stamped()
            yield _event({}, "stop")
        yield _last(1)
        return
    shape = CHUNKS.search(model)
    if shape is None:
        raise web.HTTPNotFound(text=f"no such model: {model}")
    n_chunks, rate = int(shape[1]), int(shape[2])
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for number in range(n_chunks):
        if rate and (wait_s := began_s + number / rate - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        yield _stamped()
    yield _event({}, "stop")
    yield _last(n_chunks)


async def _completions(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    if not asked.get("stream"):
        return await _whole(asked)
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    async for event in _events(asked):
        await answer.write(event)
    await answer.write(b"data: [DONE]\n\n")
    return answer


async def _whole(asked: dict[str, Any]) -> web.Response:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    finish, usage = "stop", {}
    async for event in _events(asked):
        chunk = json.loads(event.removeprefix(b"data: "))
        usage = chunk.get("usage", usage)
        for choice in chunk["choices"]:
            message["content"] += choice["delta"].get("content", "")
            finish = choice["finish_reason"] or finish
            if "tool_calls" in choice["delta"]:
                message["tool_calls"] = choice["delta"]["tool_calls"]
    choice = {"index": 0, "message": message, "finish_reason": finish}
    whole = {"id": "bench", "object": "chat.completion", "created": 0, "model": "bench"}
    return web.json_response({**whole, "choices": [choice], "usage": usage})


async def _serve() -> None:
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/v1/chat/completions", _completions)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(_serve()))
