"""Any provider, through litellm's asynchronous streaming.

litellm costs seconds to import, so it is loaded at the first call, in a thread. What this file adds to
it: limits of time, tool calls put together whole, honest usage and cost, and faults by class.
"""

import asyncio
import importlib
import logging
import os
import warnings
from collections.abc import AsyncGenerator, Awaitable
from copy import deepcopy
from functools import cache
from typing import Any, TypeVar

import structlog

from agent.events import Usage
from agent.faults import ModelAuth, ModelFault
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
from agent.settings import ModelSettings

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
            await prices.table_ready()
            self._warm = True

    async def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        await self.warm()
        pace = Pace(self._settings, request)
        answer = Answer(request)
        source = await _step(
            pace.of(load_litellm().acompletion(**self._asked(request))), request, answer
        )
        if request.stream:
            try:
                while (
                    chunk := await _step(pace.of(anext(source, None)), request, answer)
                ) is not None:
                    for item in _taken(chunk, answer):
                        pace.token()
                        yield item
                    if answer.grew_silently:
                        pace.token()
            finally:
                await source.aclose()
            _end_of_stream(source, answer)
        else:
            for item in _taken(source, answer):
                yield item
            _end_of_whole(source, answer)
        yield answer.completion(self._cost_usd(request.model, answer.usage))

    async def card(self, model: str) -> ModelCard:
        await prices.table_ready()
        return prices.card_of(model, self._settings)

    def _asked(self, request: ModelRequest) -> dict[str, Any]:
        optional = {
            "tools": deepcopy(request.tools) or None,  # litellm changes schemas for some providers
            "max_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "api_base": self._settings.api_base,
            "stream_options": {"include_usage": True} if request.stream else None,
        }
        return {
            "model": request.model,
            "messages": request.messages,
            "stream": request.stream,
            "timeout": self._settings.whole_call_s,
            # Retries are RetryingModel's.
            "num_retries": 0,
            "max_retries": 0,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def _cost_usd(self, model: str, usage: Usage | None) -> float | None:
        if usage is None or model in self._settings.prices:
            return prices.cost_usd(model, usage, self._settings)
        known = prices.known_model(model)
        if not known or not known.priced:
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


async def _step(step: Awaitable[T], request: ModelRequest, answer: Answer) -> T:
    try:
        return await step
    except ModelFault:
        raise
    except Exception as cause:
        raise fault_of(cause, request.model, started=answer.started) from cause


def _end_of_stream(source: Any, answer: Answer) -> None:
    # litellm ends a stream that was cut with a finish reason and a usage of its own making. What
    # the provider itself sent stands in these attributes of its wrapper (1.106).
    answer.finish_reason = source.received_finish_reason or source.intermittent_finish_reason
    reported = [usage for chunk in source.chunks if (usage := getattr(chunk, "usage", None))]
    answer.ended = bool(answer.finish_reason or reported)
    if not reported:
        answer.usage = None
    elif answer.usage and not any(usage_of(usage).reasoning_tokens for usage in reported):
        # It counts the reasoning's words where the provider does not say.
        answer.usage = answer.usage.model_copy(update={"reasoning_tokens": 0})


def _end_of_whole(response: Any, answer: Answer) -> None:
    answer.finish_reason = response.choices[0].finish_reason
    answer.ended = True
    if not response.usage.total_tokens:  # litellm fills in zeros
        answer.usage = None


def _taken(chunk: Any, answer: Answer) -> list[TextChunk | ReasoningChunk]:
    """Add a chunk of litellm's, or a whole answer, to ours; return what it brings to show."""
    if usage := getattr(chunk, "usage", None):
        answer.usage = usage_of(usage)
    if not chunk.choices:
        return answer.takes()
    choice = chunk.choices[0]
    said = getattr(choice, "delta", None) or choice.message
    return answer.takes(
        text=said.content or "",
        reasoning=getattr(said, "reasoning_content", None) or "",
        calls=[
            CallPiece(
                piece.index if hasattr(piece, "index") else n,
                piece.id,
                piece.function.name,
                piece.function.arguments or "",
            )
            for n, piece in enumerate(said.tool_calls or ())
        ],
    )


def usage_of(usage: Any) -> Usage:
    prompt = usage.prompt_tokens_details
    completion = usage.completion_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens or 0,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=(prompt and prompt.cached_tokens) or 0,
        reasoning_tokens=(completion and completion.reasoning_tokens) or 0,
    )


def fault_of(error: Exception, model: str, *, started: bool) -> ModelFault:
    """Our fault for what litellm raised. `started`: a part of the answer had come."""
    import litellm.exceptions as known  # loaded: it has just raised
    import openai  # the root of litellm's classes

    if isinstance(error, known.MidStreamFallbackError) and error.original_exception:
        error = error.original_exception
    headers: Any = getattr(error, "litellm_response_headers", None)
    match error:
        case known.ContextWindowExceededError():
            return overflow()
        case openai.BadRequestError(code="context_length_exceeded"):
            return overflow()
        case openai.RateLimitError():
            status = 429
        case openai.APITimeoutError():  # before APIConnectionError, which it is too
            status = 408
        # litellm shows a key that is not set as a failure of the server, which never answered.
        case openai.InternalServerError() if headers is None and (keys := missing_keys(model)):
            return ModelAuth("No key is set for the model's provider.", missing=keys)
        case openai.APIConnectionError():  # says 500
            status = None
        case openai.APIError(status_code=int(code)):
            status = code
        case _ if started:
            status = None
        case _:
            return ModelFault("The model call failed.")
    return fault_of_status(status, started=started, retry_after_s=retry_after_s(headers or {}))


def missing_keys(model: str) -> list[str]:
    """Names of the environment variables that litellm looks for and does not find."""
    return load_litellm().validate_environment(model)["missing_keys"]
