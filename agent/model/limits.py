"""Limits of concurrency, tokens and requests per model, shared by all calls of a process.

- A limit belongs to one model name: a provider that is out of room for one model must not stop the
  others. Where a provider counts several together, `shared` in the settings gives a pattern one limit.
- Retries stand outside (`agent.model.retry`): who pauses before asking again holds no place.
- A refusal (429, or an outage that names its Retry-After) holds back every session, so that the
  others do not spend attempts on being refused too.
- Each process has limits of its own. What the settings allow is divided by `n_replicas`.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Any

import structlog

from agent.events import Usage
from agent.faults import ModelBusy, ModelFault, ModelRateLimited, ModelUnavailable
from agent.model.contract import (
    Completion,
    Model,
    ModelCard,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
)
from agent.model.limiter import Call, Limiter, LimitStats
from agent.model.retry import MAX_PAUSE_S
from agent.settings import ModelLimits, ModelSettings

log = structlog.get_logger()

MAX_MODELS = 1000
"""Doors kept: users name models as they like. When there are more, those at rest are forgotten."""
BUSY_AFTER_S = 5.0
"""Told to who finds the line full."""


class LimitedModel:
    """Asks `inner` when the limits of the model let it."""

    def __init__(self, inner: Model, limits: "Limits") -> None:
        self._inner = inner
        self._limits = limits

    async def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        """
        Raises:
            ModelBusy: the model's line is full, or did not move in `limit_wait_s`.
            ModelFault: `inner`'s. ModelRateLimited also without asking, while the provider wants
                no calls for longer than a retry would wait.
        """
        door = self._limits.door(request.model)
        call = await door.enter(request)
        fresh, usage = True, None
        try:
            async with aclosing(self._inner.stream(request)) as stream:
                async for item in stream:
                    if fresh:
                        door.accepted(call)
                        fresh = False
                    if isinstance(item, Completion):
                        usage = item.usage
                    yield item
        except (ModelRateLimited, ModelUnavailable) as fault:
            door.failed(call, fault)
            raise
        finally:
            door.leave(call, usage)

    async def card(self, model: str) -> ModelCard:
        return await self._inner.card(model)


DIVIDED = ("concurrency", "tokens_per_minute", "requests_per_minute")


class Limits:
    """The doors of all models. One for a process and its loop."""

    def __init__(self, settings: ModelSettings, *, n_replicas: int = 1) -> None:
        self._settings = settings
        self._n_replicas = n_replicas
        self._doors: dict[str, Door] = {}
        self._shared: dict[str, Door] = {}
        """By pattern."""

    def door(self, model: str) -> "Door":
        door = self._doors.get(model)
        if door is None:
            if len(self._doors) >= MAX_MODELS:
                self._doors = {name: door for name, door in self._doors.items() if door.in_use}
            door = self._doors[model] = self._made(model)
        return door

    def stats(self) -> dict[str, LimitStats]:
        """By model, of those that were asked lately; models of one shared limit say the same."""
        return {model: door.stats() for model, door in self._doors.items()}

    def _made(self, model: str) -> "Door":
        patterns = [name for name in self._settings.limits if fnmatchcase(model, name)]
        if not patterns:
            return Door(model, ModelLimits(), self._settings)
        pattern = max(patterns, key=len)
        limits = self._settings.limits[pattern]
        divided = limits.model_copy(
            update={name: self._part(getattr(limits, name)) for name in DIVIDED}
        )
        if not limits.shared:
            return Door(model, divided, self._settings)
        if pattern not in self._shared:
            self._shared[pattern] = Door(pattern, divided, self._settings)
        return self._shared[pattern]

    def _part(self, allowed: int | None) -> int | None:
        return allowed and max(1, allowed // self._n_replicas)


class Door:
    """Where calls of one model wait for their turn."""

    def __init__(self, name: str, limits: ModelLimits, settings: ModelSettings) -> None:
        self._name = name
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._limiter = Limiter(limits, self._loop.time(), backoff_s=settings.retry_base_s)
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def in_use(self) -> bool:
        return not self._limiter.at_rest(self._loop.time())

    def stats(self) -> LimitStats:
        return self._limiter.stats(self._loop.time())

    async def enter(self, request: ModelRequest) -> Call:
        """Return inside; `leave` is then due. Cancelled while it waits, a call is out of the line.

        Raises:
            ModelBusy, ModelRateLimited: as `LimitedModel.stream` says.
        """
        call = Call(request.session_id)
        if self._limiter.counts_tokens:
            n_chars = chars_in(request.messages) + chars_in(request.tools)
            self._limiter.expects(call, n_chars, request.max_output_tokens)
        now = self._loop.time()
        if self._limiter.closed_s(now) > MAX_PAUSE_S:
            raise self._turned_away(now)
        if self._limiter.n_waiting >= self._settings.limit_queue:
            raise ModelBusy("Too many calls wait for this model.", retry_after_s=BUSY_AFTER_S)
        if not self._limiter.comes(call, now):
            await self._turn_of(call)
        return call

    def accepted(self, call: Call) -> None:
        self._limiter.accepted(call, self._loop.time())
        self._look()

    def failed(self, call: Call, fault: ModelRateLimited | ModelUnavailable) -> None:
        """Before `leave`."""
        retry_after_s: float | None = fault.fields.get("retry_after_s")
        if retry_after_s is None and isinstance(fault, ModelUnavailable):
            return  # it is out of order, which is not said to be for want of room
        now = self._loop.time()
        if self._limiter.refused(call, retry_after_s, now):
            stats = self._limiter.stats(now)
            log.info(
                "model_slowed",
                model=self._name,
                limit=stats.limit,
                closed_s=round(stats.closed_s, 3),
            )

    def leave(self, call: Call, usage: Usage | None = None) -> None:
        self._limiter.leaves(call, self._loop.time(), usage)
        self._look()

    async def _turn_of(self, call: Call) -> None:
        turn = asyncio.Event()
        call.wake = turn.set
        stays = False
        try:
            self._look()
            async with asyncio.timeout(self._settings.limit_wait_s):
                await turn.wait()
            stays = call.inside
        except TimeoutError as cause:
            raise ModelBusy(
                "This model's limits left no room for the call in time.", retry_after_s=BUSY_AFTER_S
            ) from cause
        finally:
            if not stays:  # though it may have been let in at the moment of its end
                self.leave(call)
        if not stays:
            raise self._turned_away(self._loop.time())

    def _turned_away(self, now: float) -> ModelFault:
        return ModelRateLimited(
            "The model's provider asks to slow down.", retry_after_s=self._limiter.closed_s(now)
        )

    def _look(self) -> None:
        """Let in whoever may, and look again when time will have let the next one in."""
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        opens_at = self._limiter.let_in(self._loop.time())
        if opens_at is not None:
            self._alarm = self._loop.call_at(opens_at, self._look)


def chars_in(value: Any) -> int:
    """Of all texts in a JSON value."""
    match value:
        case str():
            return len(value)
        case dict():
            return sum(map(chars_in, value.values()))
        case list():
            return sum(map(chars_in, value))
        case _:
            return 0
