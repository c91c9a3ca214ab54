"""What a chunk costs the process that asks the model, by who asks.

    uv run python -m bench.gateway

- `pipe`: httpx and JSON as the relay does it, without SSE to anybody: the floor.
- `direct`: `RoutedModel` with its limits and retries, over `DirectModel`.
- `litellm`: the same, over litellm.

CPU of the process, user and system, over 40 streams at once: at 50 chunks a second, and as fast as
they come. Each way is measured in a process of its own, after one stream that is not counted.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from agent.model.contract import Completion, ModelRequest, TextChunk
from agent.model.routing import RoutedModel
from agent.settings import ModelSettings
from bench.systems import model_server

WAYS = ("pipe", "direct", "litellm")
LIMIT_S = 180.0
"""Of one way, litellm's import included."""
MESSAGES = [{"role": "user", "content": "go on"}]


class Speed(NamedTuple):
    name: str
    n_streams: int
    n_chunks: int
    """Of each stream."""
    rate: int
    """Chunks a second; 0: as fast as they come."""


PACED = Speed("paced", 40, 250, 50)
FULL = Speed("full", 40, 250, 0)


Ask = Callable[[str], Coroutine[Any, Any, int]]
"""Ask the model of this name; how many chunks of text came."""


async def cpu_us_per_chunk(ask: Ask, speed: Speed) -> float:
    """
    Raises:
        RuntimeError: a chunk was lost.
    """
    await ask("chunks-10-at-0")
    model = f"chunks-{speed.n_chunks}-at-{speed.rate}"
    began_s = time.process_time()
    came = await asyncio.gather(*(ask(model) for _ in range(speed.n_streams)))
    used_s = time.process_time() - began_s
    if set(came) != {speed.n_chunks}:
        raise RuntimeError(f"{sum(came)} of {speed.n_streams * speed.n_chunks} chunks came")
    return used_s / sum(came) * 1e6


async def measured(way: str, model_url: str) -> dict[str, float]:
    """In this process."""
    if way == "pipe":
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=model_url, timeout=LIMIT_S, limits=limits) as http:
            return await _both(_piping(http))
    model = RoutedModel(ModelSettings(api_base=f"{model_url}/v1", direct=way == "direct"))
    await model.warm("openai/chunks-1-at-0")
    try:
        return await _both(_asking(model))
    finally:
        await model.close()


async def _both(ask: Ask) -> dict[str, float]:
    return {speed.name: await cpu_us_per_chunk(ask, speed) for speed in (PACED, FULL)}


def _piping(http: httpx.AsyncClient) -> Ask:
    async def ask(model: str) -> int:
        n_chunks = 0
        body = {"model": model, "messages": MESSAGES, "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    choices = json.loads(line[6:])["choices"]
                    n_chunks += bool(choices and choices[0]["delta"].get("content"))
        return n_chunks

    return ask


def _asking(model: RoutedModel) -> Ask:
    async def ask(name: str) -> int:
        n_chunks, ended = 0, False
        async with aclosing(model.stream(ModelRequest(f"openai/{name}", MESSAGES))) as stream:
            async for item in stream:
                n_chunks += isinstance(item, TextChunk)
                ended = isinstance(item, Completion)
        if not ended:
            raise RuntimeError("a stream had no end")
        return n_chunks

    return ask


def figures(model_url: str) -> dict[str, float]:
    """`gateway_{way}_{speed}_cpu_us_per_chunk`, each way in a process of its own."""
    found: dict[str, float] = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gateway", way, model_url],
            env=os.environ | {"OPENAI_API_KEY": "bench"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{way} was not measured:\n{done.stderr[-2000:]}")
        for speed, us in json.loads(done.stdout.splitlines()[-1]).items():
            found[f"gateway_{way}_{speed}_cpu_us_per_chunk"] = us
    return found


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(asyncio.run(measured(sys.argv[1], sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder, model_server(Path(folder)) as model_url:
        for name, us in figures(model_url).items():
            print(f"{name:<48}{us:10.1f}")
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
