"""Any provider, through litellm's asynchronous streaming.

litellm costs seconds to import, so it is loaded at the first call, in a thread. What this file adds to
it: limits of time, tool calls put together whole, honest usage and cost, and faults by class. No text
of a provider gets into a fault's sentence: it may hold keys and prompts.
"""

import asyncio
import contextlib
import importlib
import logging
import math
import os
import warnings
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, TypeVar
from uuid import uuid4

import structlog

from agent.events import ToolCall, Usage
from agent.faults import (
    ContextOverflow,
    ModelAuth,
    ModelCut,
    ModelFault,
    ModelRateLimited,
    ModelRefused,
    ModelTimeout,
    ModelUnavailable,
)
from agent.model.contract import Completion, ModelCard, ModelRequest, ReasoningChunk, TextChunk
from agent.settings import ModelSettings, Price

T = TypeVar("T")
log = structlog.get_logger()

ENVIRONMENT = {
    # Otherwise the import asks the network for prices and waits for it.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # litellm breaks off a stream that repeats a chunk 100 times; a long table row does that.
    "REPEATED_STREAMING_CHUNK_LIMIT": "1000000",
}


@cache
def load_litellm() -> Any:
    """Import litellm and what its first call imports. Blocks for seconds, once in a process."""
    os.environ.update(ENVIRONMENT)
    # Seconds of CPU and 130 MB: only a process that calls a provider pays them.
    litellm: Any = importlib.import_module("litellm")
    litellm.suppress_debug_info = True
    with warnings.catch_warnings(action="ignore"):
        # Builds its schemas, with a warning of pydantic's for every one.
        hello = [{"role": "user", "content": "hello"}]
        list(litellm.completion("gpt-4o", hello, mock_response="hello", stream=True))
    # Its log lines hold prompts and provider texts; whatever goes wrong arrives here as an exception.
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm


class LitellmModel:
    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._warm = False

    async def warm(self) -> None:
        """Have litellm loaded."""
        if not self._warm:
            await asyncio.to_thread(load_litellm)
            self._warm = True

    async def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        await self.warm()
        pace = Pace(self._settings, request.model)
        answer = Answer(ids_in(request.messages))
        source = await pace.of(load_litellm().acompletion(**self._asked(request)), answer)
        try:
            while (chunk := await pace.of(anext(source, None), answer)) is not None:
                for item in answer.take(chunk):
                    pace.token()
                    yield item
                if answer.grew_silently:
                    pace.token()
        finally:
            await source.aclose()
        yield self._completion(request, answer, source)

    async def card(self, model: str) -> ModelCard:
        await self.warm()
        known = known_model(model) or {}
        window = self._settings.windows.get(model) or known.get("max_input_tokens")
        return ModelCard(
            window_tokens=window or self._settings.default_window_tokens,
            priced=model in self._settings.prices or is_priced(known),
        )

    def _asked(self, request: ModelRequest) -> dict[str, Any]:
        optional = {
            "tools": request.tools or None,
            "max_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "api_base": self._settings.api_base,
        }
        return {
            "model": request.model,
            "messages": request.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "timeout": self._settings.whole_call_s,
            # Retries are RetryingModel's.
            "num_retries": 0,
            "max_retries": 0,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def _completion(self, request: ModelRequest, answer: "Answer", source: Any) -> Completion:
        # litellm ends a stream that was cut with a finish reason and a usage of its own making. What
        # the provider itself sent stands in these attributes of its wrapper (1.106).
        finish_reason = source.received_finish_reason or source.intermittent_finish_reason
        reported = any(getattr(chunk, "usage", None) for chunk in source.chunks)
        if not finish_reason and not reported:
            raise ModelCut("The model's answer broke off before its end.")
        calls = answer.tool_calls()
        usage = answer.usage if reported else None
        return Completion(
            text=answer.text,
            tool_calls=calls,
            finish_reason=finish_reason or ("tool_calls" if calls else "stop"),
            usage=usage,
            cost_usd=self._cost_usd(request.model, usage) if usage else None,
            reasoning=answer.reasoning,
        )

    def _cost_usd(self, model: str, usage: Usage) -> float | None:
        if price := self._settings.prices.get(model):
            return priced_usd(price, usage)
        known = known_model(model)
        if not known or not is_priced(known):
            return None
        try:
            costs = load_litellm().cost_per_token(
                model=model,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cache_read_input_tokens=usage.cached_tokens,
            )
        except Exception as error:  # noqa: BLE001  a bug in price arithmetic must not void an answer
            log.warning("price_failed", model=model, error=type(error).__name__)
            return None
        return sum(costs)


class Pace:
    """The limits of time of one call. Only waiting for the provider counts, not what readers take."""

    def __init__(self, settings: ModelSettings, model: str) -> None:
        self._model = model
        self._between_tokens_s = settings.between_tokens_s
        self._left_s = settings.first_token_s
        self._whole_left_s = settings.whole_call_s

    async def of(self, step: Awaitable[T], answer: "Answer") -> T:
        """Wait for a step of the call.

        Raises:
            ModelFault: the step failed, or took too long.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(min(self._left_s, self._whole_left_s)):
                return await step
        except TimeoutError as cause:
            raise ModelTimeout("The model took too long to answer.") from cause
        except Exception as cause:
            raise fault_of(cause, self._model, started=answer.started) from cause
        finally:
            self._left_s -= loop.time() - began
            self._whole_left_s -= loop.time() - began

    def token(self) -> None:
        self._left_s = self._between_tokens_s


class Answer:
    """An answer as it grows out of its chunks."""

    def __init__(self, taken_ids: Iterable[str]) -> None:
        self.usage: Usage | None = None
        self.started = False
        self.grew_silently = False
        """The last chunk brought something that is not shown: pieces of tool calls."""
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._calls: list[dict[str, str]] = []
        self._slots: dict[int, dict[str, str]] = {}
        self._taken_ids = set(taken_ids)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasonings)

    def take(self, chunk: Any) -> list[TextChunk | ReasoningChunk]:
        """Add a chunk of litellm's; return what it brings to show."""
        self.started = True
        self.grew_silently = False
        if usage := getattr(chunk, "usage", None):
            self.usage = usage_of(usage)
        items: list[TextChunk | ReasoningChunk] = []
        for choice in chunk.choices[:1]:
            if reasoning := getattr(choice.delta, "reasoning_content", None):
                self._reasonings.append(reasoning)
                items.append(ReasoningChunk(reasoning))
            if text := choice.delta.content:
                self._texts.append(text)
                items.append(TextChunk(text))
            for piece in choice.delta.tool_calls or ():
                self._add(piece)
        return items

    def _add(self, piece: Any) -> None:
        self.grew_silently = True
        function = piece.function
        index = piece.index or 0
        call = self._slots.get(index)
        # Some providers number every call 0, so a new id with a name begins a new call as well. An id
        # alone does not: others send a fresh one with every piece.
        if call is None or (piece.id and function.name and piece.id != call["id"]):
            call = {"id": piece.id or "", "name": "", "arguments": ""}
            self._slots[index] = call
            self._calls.append(call)
        call["name"] = call["name"] or function.name or ""
        call["arguments"] += function.arguments or ""

    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(
            ToolCall(
                tool_call_id=self._unique(call["id"]),
                tool=call["name"],
                arguments=call["arguments"] or "{}",
            )
            for call in self._calls
        )

    def _unique(self, call_id: str) -> str:
        if not call_id or call_id in self._taken_ids:
            call_id = f"call_{uuid4().hex[:16]}"
        self._taken_ids.add(call_id)
        return call_id


def ids_in(messages: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the tool calls that a conversation holds."""
    return {call["id"] for message in messages for call in message.get("tool_calls") or ()}


def usage_of(usage: Any) -> Usage:
    prompt = usage.prompt_tokens_details
    completion = usage.completion_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=(prompt and prompt.cached_tokens) or 0,
        reasoning_tokens=(completion and completion.reasoning_tokens) or 0,
    )


def known_model(model: str) -> dict[str, Any] | None:
    """What litellm's own table says, under the full name or the provider's. Asks no network."""
    table = load_litellm().model_cost
    return table.get(model) or table.get(model.partition("/")[2])


def is_priced(known: dict[str, Any]) -> bool:
    return "input_cost_per_token" in known


def priced_usd(price: Price, usage: Usage) -> float:
    cached_price = price.cached_usd_per_mtok
    if cached_price is None:
        cached_price = price.input_usd_per_mtok
    return (
        (usage.prompt_tokens - usage.cached_tokens) * price.input_usd_per_mtok
        + usage.cached_tokens * cached_price
        + usage.completion_tokens * price.output_usd_per_mtok
    ) / 1e6


def fault_of(error: Exception, model: str, *, started: bool) -> ModelFault:
    """Our fault for what litellm raised. `started`: a part of the answer had come."""
    import litellm.exceptions as known  # loaded: it has just raised
    import openai  # the root of litellm's classes

    if isinstance(error, known.MidStreamFallbackError) and error.original_exception:
        error = error.original_exception
    headers: Any = getattr(error, "litellm_response_headers", None)
    wait = {"retry_after_s": retry_after_s(headers or {})}
    match error:
        case known.ContextWindowExceededError():
            fault = ContextOverflow("The conversation does not fit the model's window.")
        case openai.BadRequestError(code="context_length_exceeded"):
            fault = ContextOverflow("The conversation does not fit the model's window.")
        case openai.RateLimitError():
            fault = ModelRateLimited("The model's provider asks to slow down.", **wait)
        case openai.APITimeoutError():  # before APIConnectionError, which it is too
            fault = ModelTimeout("The model took too long to answer.")
        case openai.APIError(status_code=401 | 403):
            fault = ModelAuth("The model's provider refused the key.")
        case openai.APIError(status_code=status) if 400 <= status < 500:
            fault = ModelRefused("The model's provider rejected the request, or the model's name.")
        # litellm shows a key that is not set as a failure of the server, which never answered.
        case openai.InternalServerError() if headers is None and (keys := missing_keys(model)):
            fault = ModelAuth("No key is set for the model's provider.", missing=keys)
        case _ if started:
            fault = ModelCut("The model's answer broke off before its end.")
        case openai.APIConnectionError():
            fault = ModelUnavailable("The model's provider cannot be reached.")
        case openai.APIError(status_code=status) if status >= 500:
            fault = ModelUnavailable("The model's provider has a problem of its own.", **wait)
        case _:
            fault = ModelFault("The model call failed.")
    return fault


def missing_keys(model: str) -> list[str]:
    """Names of the environment variables that litellm looks for and does not find."""
    return load_litellm().validate_environment(model)["missing_keys"]


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The Retry-After header, in seconds or as a date; None without one that can be read."""
    text = headers.get("retry-after") or ""
    with contextlib.suppress(ValueError):
        seconds = float(text)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError):
        at = parsedate_to_datetime(text)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return max(0.0, (at - datetime.now(UTC)).total_seconds())
    return None
