"""From a command to its fact: pure, given the session's context.

`fact_of` is the only place that says whether a command can be. It runs where commits are ordered, so
what it saw still holds when its fact is written.
"""

from collections.abc import Callable
from typing import Any

from actors.places import queue_full
from actors.protocol import (
    MAX_TEXT_CHARS,
    Accepted,
    AnyCommand,
    Close,
    Compact,
    Conflict,
    Decide,
    Interrupt,
    Invalid,
    Seed,
    SendMessage,
    SwitchModel,
    TooLarge,
    Truncate,
    Undo,
)
from agent.context import Answer, Context
from agent.events import (
    ApprovalDecided,
    Command,
    CompactionRequested,
    Cursor,
    InterruptRequested,
    ModelSwitched,
    Rewound,
    SeedRequested,
    SessionClosed,
    UserMessage,
)
from agent.jsontext import is_object
from agent.transcript import well_formed


class Repeated(Exception):
    """Not an error: the command was carried out before, and this was its answer."""

    def __init__(self, answer: Accepted) -> None:
        super().__init__(answer)
        self.answer = answer


def answered(known: Answer, command: AnyCommand) -> Accepted:
    """The first answer to a command whose `message_id` the session has recorded.

    Raises:
        Conflict: the `message_id` belongs to another kind of command.
    """
    if known.kind != _KINDS[type(command)]:
        raise Conflict("This message_id was used for another command.")
    return Accepted(known.turn, str(Cursor(known.seq)), known.n_messages)


def remembered(context: Context, command: AnyCommand) -> Accepted | None:
    """The same where the context remembers the command. None: it is new, or long ago.

    Raises:
        Conflict
    """
    known = context.answers.get(command.message_id) if command.message_id else None
    return answered(known, command) if known else None


def fact_of(context: Context, command: AnyCommand, *, max_queued: int) -> Command:
    """The fact that the command makes now.

    Raises:
        Repeated: it was made before.
        Conflict, Invalid, TooLarge: it cannot be; the sentence says why.
        QueueFull: as many turns wait as may.
    """
    if known := remembered(context, command):
        raise Repeated(known)
    if context.closed:
        raise Conflict("The session is closed.")
    fact = _MAKERS[type(command)](context, command)
    if fact.turn > context.n_turns and len(context.queue) >= max_queued:
        raise queue_full(max_queued, "turns are waiting")
    return fact


def _message(context: Context, command: SendMessage) -> Command:
    if len(command.text) > MAX_TEXT_CHARS:
        raise TooLarge(f"A message has at most {MAX_TEXT_CHARS} characters.")
    if not command.text.strip():
        raise Invalid("The message is empty.")
    return UserMessage(turn=context.n_turns + 1, message_id=command.message_id, text=command.text)


def _decisions(context: Context, command: Decide) -> Command:
    calls = [decision.tool_call_id for decision in command.decisions]
    if len(set(calls)) < len(calls):
        raise Invalid("A call has two decisions.")
    if unknown := set(calls) - context.pending.keys():
        raise Conflict(f"These calls wait for no decision: {', '.join(sorted(unknown))}.")
    for decision in command.decisions:
        if (decision.decision == "edit") != (decision.arguments is not None):
            raise Invalid("`edit`, and only `edit`, carries arguments.")
        if decision.arguments is not None and not is_object(decision.arguments):
            raise Invalid("The edited arguments are no JSON object.")
    return ApprovalDecided(
        turn=context.n_turns + 1, message_id=command.message_id, decisions=command.decisions
    )


def _interrupt(context: Context, command: Interrupt) -> Command:
    if context.turn is None:
        raise Conflict("No turn is running.")
    return InterruptRequested(turn=context.turn.fact.turn, message_id=command.message_id)


def _undo(context: Context, command: Undo) -> Command:
    if not context.user_turns:
        raise Conflict("There is no user message to undo.")
    return _rewound(context, context.user_turns[-1], command.message_id)


def _truncate(context: Context, command: Truncate) -> Command:
    turns = context.user_turns
    if not 0 <= command.user_message_index < len(turns):
        raise Invalid(
            f"The session has {len(turns)} user messages;"
            f" there is none with index {command.user_message_index}."
        )
    return _rewound(context, turns[command.user_message_index], command.message_id)


def _rewound(context: Context, turn: int, message_id: str | None) -> Command:
    """Take the turn, and all after it, out of the view."""
    if context.turn is not None:
        raise Conflict("A turn is running; interrupt it, or wait for its end.")
    return Rewound(message_id=message_id, to=turn - 1, n_messages=context.n_messages_upto(turn - 1))


def _compact(context: Context, command: Compact) -> Command:
    if not context.can_compact():
        raise Conflict("There is nothing to compact.")
    return CompactionRequested(turn=context.n_turns + 1, message_id=command.message_id)


def _switch(_: Context, command: SwitchModel) -> Command:
    if not command.model.strip():
        raise Invalid("The model has no name.")
    return ModelSwitched(message_id=command.message_id, model=command.model)


def _seed(context: Context, command: Seed) -> Command:
    return seed_fact(command.messages, context.n_turns + 1, command.message_id)


def seed_fact(messages: tuple[Any, ...], turn: int, message_id: str | None = None) -> SeedRequested:
    """
    Raises:
        Invalid: none of the messages is well-formed.
    """
    kept = well_formed(messages)
    if not kept.messages:
        raise Invalid("None of the messages is a chat message with text.")
    return SeedRequested(
        turn=turn, message_id=message_id, messages=kept.messages, n_dropped=kept.n_dropped
    )


def _close(_: Context, command: Close) -> Command:
    return SessionClosed(message_id=command.message_id)


_MAKERS: dict[type[Any], Callable[[Context, Any], Command]] = {
    SendMessage: _message,
    Decide: _decisions,
    Interrupt: _interrupt,
    Undo: _undo,
    Truncate: _truncate,
    Compact: _compact,
    SwitchModel: _switch,
    Seed: _seed,
    Close: _close,
}
_KINDS: dict[type[Any], str] = {
    SendMessage: "user_message",
    Decide: "approval_decided",
    Interrupt: "interrupt_requested",
    Undo: "rewound",
    Truncate: "rewound",
    Compact: "compaction_requested",
    SwitchModel: "model_switched",
    Seed: "seed_requested",
    Close: "session_closed",
}
