"""An answer as it grows out of a provider's chunks, its limits of time, and what goes wrong with it.

What every adapter shares, so that all give the same items and the same faults. No text of a provider
gets into a fault's sentence: it may hold keys and prompts.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

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
from agent.model.contract import Completion, ModelRequest, ReasoningChunk, TextChunk
from agent.settings import ModelSettings

T = TypeVar("T")

FINISH_REASONS = {
    "eos_token": "stop",
    "eos": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "max_tokens": "length",
    "model_length": "length",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
}
"""Words of TGI, Anthropic, Mistral and others, in OpenAI's."""


class Pace:
    """The limits of time of one call. Only waiting for the provider counts, not what readers take."""

    def __init__(self, settings: ModelSettings, request: ModelRequest) -> None:
        self._between_tokens_s = settings.between_tokens_s
        # An answer that comes in one piece has no first token before its last.
        self._left_s = settings.first_token_s if request.stream else settings.whole_call_s
        self._whole_left_s = settings.whole_call_s

    async def of(self, step: Awaitable[T]) -> T:
        """Wait for a step of the call.

        Raises:
            ModelTimeout: it took too long.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(min(self._left_s, self._whole_left_s)):
                return await step
        except TimeoutError as cause:
            raise ModelTimeout("The model took too long to answer.") from cause
        finally:
            self._left_s -= loop.time() - began
            self._whole_left_s -= loop.time() - began

    def token(self) -> None:
        self._left_s = self._between_tokens_s


class CallPiece(NamedTuple):
    """A piece of a tool call, or a whole one."""

    position: int | None
    """Which call it belongs to."""
    call_id: str | None
    name: str | None
    arguments: str


class Answer:
    """An answer as it grows. `takes` is told once per chunk what the chunk brings."""

    def __init__(self, request: ModelRequest) -> None:
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.ended = False
        """The provider gave a sign that this is all."""
        self.started = False
        self.grew_silently = False
        """The last chunk brought something that is not shown: pieces of tool calls."""
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._calls: list[dict[str, str]] = []
        self._slots: dict[int, dict[str, str]] = {}
        self._taken_ids = ids_in(request.messages)

    def takes(
        self, *, text: str = "", reasoning: str = "", calls: Iterable[CallPiece] = ()
    ) -> list[TextChunk | ReasoningChunk]:
        """Add what a chunk brings; return what of it is shown."""
        self.started = True
        self.grew_silently = False
        items: list[TextChunk | ReasoningChunk] = []
        if reasoning:
            self._reasonings.append(reasoning)
            items.append(ReasoningChunk(reasoning))
        if text:
            self._texts.append(text)
            items.append(TextChunk(text))
        fresh: list[dict[str, str]] = []
        for piece in calls:
            self.grew_silently = True
            self._add(piece, fresh)
        return items

    def _add(self, piece: CallPiece, fresh: list[dict[str, str]]) -> None:
        """`fresh`: the calls that the same chunk has begun."""
        slot = piece.position or 0
        call = self._slots.get(slot)
        # Some providers number every call 0, or none, so a new id with a name begins a new call as
        # well. An id alone does not: others send a fresh one with every piece. And a chunk that
        # brings whole calls names each.
        anew = (
            piece.name
            and call is not None
            and (
                (piece.call_id and piece.call_id != call["id"]) or any(call is one for one in fresh)
            )
        )
        if call is None or anew:
            call = {"id": piece.call_id or "", "name": "", "arguments": ""}
            self._slots[slot] = call
            self._calls.append(call)
            fresh.append(call)
        call["name"] = call["name"] or piece.name or ""
        call["arguments"] += piece.arguments

    def completion(self, cost_usd: float | None) -> Completion:
        """
        Raises:
            ModelCut: the provider gave no sign that this is all.
        """
        if not self.ended:
            raise ModelCut("The model's answer broke off before its end.")
        calls = tuple(
            ToolCall(
                tool_call_id=self._unique(call["id"]),
                tool=call["name"],
                arguments=call["arguments"] or "{}",
            )
            for call in self._calls
        )
        reason = self.finish_reason or ("tool_calls" if calls else "stop")
        return Completion(
            text="".join(self._texts),
            tool_calls=calls,
            finish_reason=FINISH_REASONS.get(reason, reason),
            usage=self.usage,
            cost_usd=cost_usd,
            reasoning="".join(self._reasonings),
        )

    def _unique(self, call_id: str) -> str:
        if not call_id or call_id in self._taken_ids:
            call_id = f"call_{uuid4().hex[:16]}"
        self._taken_ids.add(call_id)
        return call_id


def ids_in(messages: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the tool calls that a conversation holds."""
    return {call["id"] for message in messages for call in message.get("tool_calls") or ()}


def overflow() -> ModelFault:
    return ContextOverflow("The conversation does not fit the model's window.")


def fault_of_status(
    status: int | None, *, started: bool, retry_after_s: float | None = None
) -> ModelFault:
    """Our fault for an HTTP status. None: nothing came, or what came broke off.

    `started`: a part of the answer had come.
    """
    match status:
        case 429:
            fault = ModelRateLimited(
                "The model's provider asks to slow down.", retry_after_s=retry_after_s
            )
        case 408 | 504:
            fault = ModelTimeout("The model took too long to answer.")
        case 401 | 403:
            fault = ModelAuth("The model's provider refused the key.")
        case int() if 300 <= status < 400:
            fault = ModelRefused("The model's server sends elsewhere: `api_base` must be exact.")
        case int() if 400 <= status < 500:
            fault = ModelRefused("The model's provider rejected the request, or the model's name.")
        case _ if started:
            fault = ModelCut("The model's answer broke off before its end.")
        case None:
            fault = ModelUnavailable("The model's provider cannot be reached.")
        case _:
            fault = ModelUnavailable(
                "The model's provider has a problem of its own.", retry_after_s=retry_after_s
            )
    return fault


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
