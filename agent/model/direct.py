"""OpenAI-compatible servers, asked over HTTP without litellm.

A chunk costs a fraction of what it costs through litellm; items, usage, cost and faults are the same.
All that a server may send is bounded: an event, an error's body, and an answer as a whole.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import httpx
from httpx_sse import EventSource

from agent.events import Usage
from agent.faults import ModelFault, boundary
from agent.model import prices
from agent.model.answers import (
    Answer,
    CallPiece,
    Pace,
    fault_of_status,
    overflow,
    retry_after_s,
)
from agent.model.contract import Completion, ModelCard, ModelRequest, ReasoningChunk, TextChunk
from agent.model.endpoints import Endpoint, endpoint_of
from agent.settings import ModelSettings

MAX_CONNECTIONS = 5000
"""As many as the gateway takes calls (`actors.gateway.MAX_ONGOING`)."""
MAX_IDLE_CONNECTIONS = 100
IDLE_S = 30.0
"""Shorter than servers keep idle connections (uvicorn 5, nginx 75, OpenAI's edge minutes); one that
closed in the meantime is noticed before it is used."""
CONNECT_S = 15.0
MAX_EVENT_BYTES = 4 * 1024**2
"""One tool call that writes a large file may come whole in one event."""
MAX_ANSWER_BYTES = 64 * 1024**2
"""128,000 tokens, each in an event of 500 bytes."""
MAX_ERROR_BYTES = 64 * 1024
LAST_BYTES_S = 0.2
"""For the end of the response behind `[DONE]`, so that its connection serves the next call."""

BROKEN = (httpx.HTTPError, httpx.InvalidURL, ValueError)
"""The way broke, or what came is not what was announced: neither UTF-8 nor JSON, cut, garbled."""
OVERFLOWS = (
    "context_length_exceeded",
    "maximum context length",
    "maximum context limit",
    "longer than the model's context length",
    "exceed context limit",
    "exceeds the available context size",
    "exceeds the maximum number of tokens allowed",
    "input tokens exceed",
    "`inputs` tokens + `max_new_tokens` must be",
    "maximum input length",
)
"""What OpenAI, vLLM, SGLang, llama.cpp, TGI and others say. There is no status of its own for it."""
STATUS_OF = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "insufficient_quota": 429,
    "overloaded": 503,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "invalid_request_error": 400,
    "BadRequestError": 400,
}
"""Of an error that comes inside a response that began well, by its `code` or `type`."""

Json = dict[str, Any]


class DirectModel:
    """Keeps connections: one for a process and its loop, and `close` at the end."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._client: httpx.AsyncClient | None = None

    async def warm(self) -> None:
        """Have the table of prices and the client, which read files."""
        await self._ready()

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()

    async def card(self, model: str) -> ModelCard:
        await prices.table_ready()
        return prices.card_of(model, self._settings)

    async def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        client = await self._ready()
        endpoint = endpoint_of(request.model, self._settings)
        answer = Answer(request)
        pace = Pace(self._settings, request)
        response = await self._opened(client, endpoint, request, pace)
        try:
            chunks = _chunks(response, answer, pace)
            async with aclosing(chunks):
                async for chunk in chunks:
                    for item in _taken(chunk, answer):
                        pace.token()
                        yield item
                    if answer.grew_silently:
                        pace.token()
            cost = prices.cost_usd(request.model, answer.usage, self._settings)
            yield answer.completion(cost)
        finally:
            await response.aclose()

    async def _ready(self) -> httpx.AsyncClient:
        if self._client is None:
            await prices.table_ready()
            client = await asyncio.to_thread(_new_client)  # reads certificates
            # Another call may have been as early; the client is nobody's until it is used.
            self._client = self._client or client
        return self._client

    async def _opened(
        self, client: httpx.AsyncClient, endpoint: Endpoint, request: ModelRequest, pace: Pace
    ) -> httpx.Response:
        """
        Raises:
            ModelFault: no connection, or a refusal.
        """
        body = json.dumps(_asked(endpoint, request), ensure_ascii=False, separators=(",", ":"))
        try:
            asked = client.build_request(
                "POST",
                endpoint.url,
                # Half a surrogate pair, as a tool's output may hold, has no UTF-8.
                content=body.encode(errors="replace"),
                headers=endpoint.headers | {"Content-Type": "application/json"},
            )
            response = await pace.of(client.send(asked, stream=True))
        except BROKEN as cause:
            raise fault_of_status(None, started=False) from cause
        if response.status_code == 200:
            return response
        try:
            raise await _refusal(response, pace)
        finally:
            await response.aclose()


def _new_client() -> httpx.AsyncClient:
    limits = httpx.Limits(
        max_connections=MAX_CONNECTIONS,
        max_keepalive_connections=MAX_IDLE_CONNECTIONS,
        keepalive_expiry=IDLE_S,
    )
    # The rest of the times is Pace's. A stream that is compressed comes late, in lumps.
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=CONNECT_S),
        limits=limits,
        headers={"Accept-Encoding": "identity", "User-Agent": "troupe"},
    )


def _asked(endpoint: Endpoint, request: ModelRequest) -> Json:
    optional: Json = {
        "tools": request.tools or None,
        endpoint.limit_field: request.max_output_tokens,
        "temperature": request.temperature,
        "stream": request.stream or None,
        "stream_options": {"include_usage": True} if request.stream else None,
    }
    return {
        "model": endpoint.model,
        "messages": request.messages,
        **{name: value for name, value in optional.items() if value is not None},
    }


async def _chunks(response: httpx.Response, answer: Answer, pace: Pace) -> AsyncGenerator[Any]:
    """The chunks of the answer, JSON of any shape; an answer that came as one piece is one chunk.

    Raises:
        ModelFault: the way broke before the answer had its end.
    """
    kind = response.headers.get("content-type", "")
    # Servers exist that name no kind. One that was asked for a stream may still answer in one piece.
    source = _events(response) if not kind or "event-stream" in kind else _one(response)
    async with aclosing(source):
        while True:
            try:
                data = await pace.of(anext(source, None))
                chunk: Any = None if data is None else json.loads(data)
            except BROKEN as cause:
                if answer.ended:
                    return
                raise fault_of_status(None, started=answer.started) from cause
            if chunk is None:
                return
            yield chunk


async def _events(response: httpx.Response) -> AsyncGenerator[str]:
    """The data of the events, up to the mark of the end."""
    pieces = Bounded(response)
    # A stream of events is UTF-8, whatever a server says.
    plain = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=pieces)
    events = EventSource(plain).aiter_sse()
    async with aclosing(events):
        async for event in events:
            pieces.n_event_bytes = 0
            if event.data == "[DONE]":
                break
            if event.data:
                yield event.data
        else:
            return
        try:
            async with asyncio.timeout(LAST_BYTES_S):
                await anext(events, None)
        except (TimeoutError, *BROKEN):
            pass  # the answer is whole, only the connection is lost


async def _one(response: httpx.Response) -> AsyncGenerator[str]:
    yield (await _body(response, MAX_ANSWER_BYTES)).decode()


class Bounded(httpx.AsyncByteStream):
    """The bytes of a response, uncompressed, until there are too many."""

    def __init__(self, response: httpx.Response) -> None:
        self.n_event_bytes = 0
        """Since the last event, reset by the reader: the parser of events has no limit of its own."""
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        n_bytes = 0
        async for piece in self._response.aiter_bytes():
            n_bytes += len(piece)
            self.n_event_bytes += len(piece)
            if self.n_event_bytes > MAX_EVENT_BYTES or n_bytes > MAX_ANSWER_BYTES:
                raise ModelFault("The model's server sent more than an answer can be.")
            yield piece


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > max_bytes:
            raise ModelFault("The model's server sent more than an answer can be.")
    return bytes(body)


async def _refusal(response: httpx.Response, pace: Pace) -> ModelFault:
    try:
        body = await pace.of(_body(response, MAX_ERROR_BYTES))
    except (ModelFault, *BROKEN):
        body = b""  # the status says enough
    text = body.decode(errors="replace")
    return _fault_of(text, response.status_code, wait_s=retry_after_s(response.headers))


def _fault_of(
    text: str, status: int, *, started: bool = False, wait_s: float | None = None
) -> ModelFault:
    text = text.lower()
    if status not in {401, 403, 429} and any(words in text for words in OVERFLOWS):
        return overflow()
    return fault_of_status(status, started=started, retry_after_s=wait_s)


def _taken(chunk: Json, answer: Answer) -> list[TextChunk | ReasoningChunk]:
    """Add a chunk to the answer; return what it brings to show.

    Raises:
        ModelFault: it is an error, or has no shape that is known.
    """
    with boundary(ModelFault, "The model's server sent what nobody can read."):
        if error := chunk.get("error") or (chunk.get("object") == "error" and chunk):
            raise _fault_of(json.dumps(error), _status_of(error), started=answer.started)
        if usage := chunk.get("usage"):
            answer.usage = _usage(usage)
        choices = chunk.get("choices")
        if not choices:
            # Usage beside choices may be a running count, usage alone is the last word.
            answer.ended = answer.ended or bool(usage)
            return answer.takes()
        choice = choices[0]
        if reason := choice.get("finish_reason"):
            answer.finish_reason = reason
            answer.ended = True
        delta = choice.get("delta") or choice.get("message") or {}
        text, thought = _said(delta.get("content"))
        return answer.takes(
            text=text,
            reasoning=thought or delta.get("reasoning_content") or delta.get("reasoning") or "",
            calls=[_piece(piece) for piece in delta.get("tool_calls") or ()],
        )


def _said(content: Any) -> tuple[str, str]:
    """Text and reasoning of a `content`, which Mistral sends in parts where a model reasons."""
    if not isinstance(content, list):
        return content or "", ""
    text = reasoning = ""
    for part in cast("list[Json]", content):
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "thinking":
            reasoning += "".join(thought.get("text", "") for thought in part["thinking"])
    return text, reasoning


def _piece(piece: Json) -> CallPiece:
    function = piece.get("function") or {}
    arguments = function.get("arguments") or ""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)  # Ollama and old TGI send an object
    return CallPiece(piece.get("index"), piece.get("id"), function.get("name"), arguments)


def _usage(usage: Json) -> Usage:
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        # The second name is DeepSeek's.
        cached_tokens=prompt.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0,
        reasoning_tokens=completion.get("reasoning_tokens") or 0,
    )


def _status_of(error: Any) -> int:
    """The HTTP status that an error would have had, had it come in time."""
    if not isinstance(error, dict):
        return 500
    said = cast("Json", error)
    for name in (said.get("code"), said.get("type"), said.get("error_type")):
        if str(name).isdigit() and 400 <= int(str(name)) < 600:
            return int(str(name))
        if name in STATUS_OF:
            return STATUS_OF[name]
    return 500
