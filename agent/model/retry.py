"""Asking again, when that can help and nobody has seen anything yet."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import structlog

from agent.faults import ModelCut, ModelFault, ModelRateLimited, ModelTimeout, ModelUnavailable
from agent.model.contract import (
    Completion,
    Model,
    ModelCard,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
)
from agent.settings import ModelSettings

log = structlog.get_logger()

PASSING = (ModelRateLimited, ModelUnavailable, ModelTimeout, ModelCut)
"""Faults that may be gone the next time."""
MAX_PAUSE_S = 60.0
"""A person waits at the other end. A provider that asks for longer gets no second call from this turn."""


class RetryingModel:
    """Repeats a call that failed for a passing reason before its first chunk."""

    def __init__(
        self,
        inner: Model,
        settings: ModelSettings,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._sleep = sleep
        self._jitter = jitter

    async def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        n_retries = 0
        while True:
            shown = False
            try:
                async with aclosing(self._inner.stream(request)) as stream:
                    async for item in stream:
                        shown = True
                        if isinstance(item, Completion):
                            yield item._replace(n_retries=item.n_retries + n_retries)
                        else:
                            yield item
            except PASSING as fault:
                pause_s = self._pause_s(fault, n_retries)
                if shown or n_retries == self._settings.max_retries or pause_s > MAX_PAUSE_S:
                    raise
                log.info("model_retried", model=request.model, code=fault.code, pause_s=pause_s)
            else:
                return
            n_retries += 1
            # An answer in one piece comes after minutes of silence, which many a proxy takes for an end.
            request = request._replace(stream=True)
            await self._sleep(pause_s)

    async def card(self, model: str) -> ModelCard:
        return await self._inner.card(model)

    def _pause_s(self, fault: ModelFault, n_retries: int) -> float:
        asked_s: float | None = fault.fields.get("retry_after_s")
        if asked_s is not None:
            return asked_s
        # Full jitter: sessions that failed together must not come back together.
        return self._jitter(0.0, min(MAX_PAUSE_S, self._settings.retry_base_s * 2**n_retries))
