"""The view of a session: its entries, and the entries as chat messages.

An assistant entry carries the results of its tool calls, so every boundary between entries is a
tool-call boundary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from agent.events import AssistantMessage, Decision, ToolCall, ToolFinished
from agent.jsontext import is_object
from agent.owed import Due

CHARS_PER_TOKEN = 4
"""A rule of thumb for English and code; the provider's own count replaces it after each call."""
NOT_EXECUTED = "The call was not executed: the turn ended before it."


@dataclass
class Call:
    """One tool call and how far it is."""

    proposed: ToolCall
    decision: Decision | None = None
    asked: bool = False
    started_epoch: int = 0
    """0: not started."""
    arguments: str = ""
    result: ToolFinished | None = None

    def __post_init__(self) -> None:
        self.arguments = self.arguments or self.proposed.arguments

    @property
    def due(self) -> Due:
        return Due(self.proposed.tool_call_id, self.proposed.tool, self.arguments)


@dataclass(frozen=True)
class UserEntry:
    seq: int
    turn: int
    text: str
    seed: bool = False
    """Told by the session's restore, not typed by the user: undo and truncate do not count it."""
    kind: Literal["user"] = "user"


@dataclass(frozen=True)
class AssistantEntry:
    seq: int
    turn: int
    message: AssistantMessage
    calls: dict[str, Call] = field(default_factory=dict[str, Call])
    kind: Literal["assistant"] = "assistant"

    @classmethod
    def of(cls, message: AssistantMessage, seq: int) -> "AssistantEntry":
        calls = {call.tool_call_id: Call(call) for call in message.tool_calls}
        return cls(seq, message.turn, message, calls)

    @property
    def unsettled(self) -> list[Call]:
        return [call for call in self.calls.values() if call.result is None]


Entry = Annotated[UserEntry | AssistantEntry, Field(discriminator="kind")]


def chat(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Entries in OpenAI chat format. A call without a result gets a text that says so."""
    messages: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, UserEntry):
            messages.append({"role": "user", "content": entry.text})
            continue
        message: dict[str, Any] = {"role": "assistant", "content": entry.message.text}
        if entry.calls:
            message["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {"name": call.proposed.tool, "arguments": _object(call.proposed)},
                }
                for call_id, call in entry.calls.items()
            ]
        messages.append(message)
        messages.extend(
            {
                "role": "tool",
                "tool_call_id": call_id,
                "name": call.proposed.tool,
                "content": _told(call),
            }
            for call_id, call in entry.calls.items()
        )
    return messages


def _told(call: Call) -> str:
    text = call.result.text if call.result else NOT_EXECUTED
    if call.arguments != call.proposed.arguments:
        return f"The user edited the arguments of this call to: {call.arguments}\n{text}"
    return text


def _object(call: ToolCall) -> str:
    """The arguments as providers accept them back: text that is no JSON object is refused by some."""
    return call.arguments if is_object(call.arguments) else "{}"


def tokens_of(entry: Entry) -> int:
    if isinstance(entry, UserEntry):
        return len(entry.text) // CHARS_PER_TOKEN + 1
    chars = len(entry.message.text) + sum(
        len(call.arguments) + len(call.result.text if call.result else "")
        for call in entry.calls.values()
    )
    return chars // CHARS_PER_TOKEN + 1


def handover(summary: str, asked: str | None) -> str:
    """The summary as a message, with the newest cut user message word for word: it is the task."""
    quoted = (
        ""
        if asked is None
        else f"\n\nThe user's last message before this point, verbatim:\n{asked}"
    )
    return f"Summary of the conversation so far:\n{summary}{quoted}"
