"""The physical floor: FastAPI and uvicorn piping a model's stream to SSE with httpx, and nothing else.

    python -m bench.servers.relay MODEL_URL        prints its URL, serves until it is ended

No session, no journal, no loop: what is lost when this process dies, is lost.
"""

import json
import sys
from collections.abc import AsyncGenerator

import httpx
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from bench.servers.listening import listening

BODY = {"stream": True, "stream_options": {"include_usage": True}}


def relay(model_url: str) -> FastAPI:
    app = FastAPI()
    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(base_url=model_url, timeout=600, limits=limits)

    @app.post("/chat")
    async def chat(request: Request) -> StreamingResponse:  # pyright: ignore[reportUnusedFunction]
        asked = await request.json()
        return StreamingResponse(_piped(http, asked), media_type="text/event-stream")

    return app


async def _piped(http: httpx.AsyncClient, asked: dict[str, object]) -> AsyncGenerator[bytes]:
    async with http.stream("POST", "/v1/chat/completions", json=asked | BODY) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line[6:])["choices"]:
                if text := choice["delta"].get("content"):
                    data = json.dumps({"text": text})
                    yield f"event: text_delta\ndata: {data}\n\n".encode()
    yield b"event: turn_ended\ndata: {}\n\n"


def main() -> None:
    listener = listening()
    config = uvicorn.Config(relay(sys.argv[1]), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])  # on uvloop, as uvicorn does where it is there


if __name__ == "__main__":
    main()
