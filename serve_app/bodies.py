"""What comes in and goes out as JSON: strict, every field with a limit."""

import json
import math
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json

from actors.protocol import MAX_TEXT_CHARS, Invalid, SessionView, Status, TooLarge
from agent.events import Decision, Usage

MAX_JSON_DEPTH = 32
MAX_JSON_NODES = 50_000
"""Of one body: walking so many takes about 10 ms of the event loop."""
MAX_INT_BITS = 1024
MAX_SEED_MESSAGES = 2000
MAX_DECISIONS = 64
MAX_METADATA_CHARS = 16_384

MessageId = Annotated[
    str,
    Field(
        pattern="^[!-~]{1,128}$",
        description="Idempotency key: repeating it returns the first answer",
    ),
]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Feedback = Annotated[str, Field(max_length=10_000)]


class In(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def whole(value: Any) -> Any:
    """In JSON 3.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class CommandIn(In):
    message_id: MessageId | None = None


class OpenIn(CommandIn):
    model: Name | None = None
    agent: Name | None = None
    title: Annotated[str, Field(max_length=200)] | None = None
    seed_messages: list[Any] = Field(default=[], max_length=MAX_SEED_MESSAGES)
    metadata: dict[str, Any] = Field(
        default={},
        max_length=64,
        description=f"Free JSON, at most {MAX_METADATA_CHARS} characters",
    )

    @model_validator(mode="after")
    def _metadata_is_small(self) -> Self:
        if len(json.dumps(self.metadata)) > MAX_METADATA_CHARS:
            raise ValueError(f"metadata is larger than {MAX_METADATA_CHARS} characters of JSON")
        return self


class MessageIn(CommandIn):
    text: str = Field(
        min_length=1,
        json_schema_extra={"maxLength": MAX_TEXT_CHARS},
        description="A longer one is 413 too_large",
    )

    def checked_text(self) -> str:
        """
        Raises:
            TooLarge: 413 and not 422, so the model itself has no limit.
        """
        if len(self.text) > MAX_TEXT_CHARS:
            raise TooLarge(
                f"A message has at most {MAX_TEXT_CHARS} characters, this one {len(self.text)}.",
                limit=MAX_TEXT_CHARS,
            )
        return self.text


class AnswerIn(In):
    """Has no arguments: a client that means an edit must not have the model's own ones run."""

    tool_call_id: Name
    decision: Literal["approve", "reject"]
    arguments: None = None
    feedback: Feedback | None = None


class EditIn(In):
    tool_call_id: Name
    decision: Literal["edit"]
    arguments: dict[str, Any] = Field(description="What runs instead")
    feedback: Feedback | None = None


def decision_of(answer: AnswerIn | EditIn) -> Decision:
    return Decision(
        tool_call_id=answer.tool_call_id,
        decision=answer.decision,
        arguments=None if answer.arguments is None else json.dumps(answer.arguments),
        feedback=answer.feedback,
    )


class ApprovalsIn(CommandIn):
    decisions: list[Annotated[AnswerIn | EditIn, Field(discriminator="decision")]] = Field(
        min_length=1, max_length=MAX_DECISIONS
    )


class TruncateIn(CommandIn):
    user_message_index: Annotated[int, BeforeValidator(whole)] = Field(
        ge=0, le=2**31 - 1, description="0 is the first visible one"
    )


class ModelIn(CommandIn):
    model: Name


class SeedIn(CommandIn):
    messages: list[Any] = Field(min_length=1, max_length=MAX_SEED_MESSAGES)


class Out(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class PendingOut(Out):
    tool_call_id: str
    tool: str
    arguments: Any


class SessionOut(Out):
    session_id: str
    user_id: str
    title: str | None
    model: str
    agent: str
    status: Status
    created_at: datetime
    updated_at: datetime
    n_messages: int
    pending_approval: list[PendingOut] | None
    usage: Usage
    spend_usd: float
    n_unpriced: int = Field(description="Model calls that spend_usd does not count: no price known")
    cursor: str

    @classmethod
    def of(cls, view: SessionView) -> Self:
        return cls.model_validate(view)


class SessionsOut(Out):
    data: list[SessionOut]
    next: str | None = Field(description="`after` of the next page; null: this is the last")


class MessagesOut(Out):
    data: list[dict[str, Any]]


class TurnAccepted(Out):
    turn: int
    cursor: str


class CommandAccepted(Out):
    cursor: str


class SeedAccepted(Out):
    cursor: str
    n_messages: int


class CountOut(Out):
    live: int
    limit: int


class LaneOut(Out):
    live: int


class LanesOut(Out):
    interactive: LaneOut
    bulk: LaneOut


class CapacityOut(Out):
    live: int
    limit: int
    warm: int
    user: CountOut
    lanes: LanesOut


class HealthOut(Out):
    status: Literal["ok", "ready"]


def parsed(raw: bytes) -> Any:
    """The body as JSON that anything behind may store and write again.

    Raises:
        Invalid: not JSON (NaN, lone surrogates and endless nesting are none), or it holds NUL
            characters, numbers that do not fit, or more or deeper values than a body may.
    """
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as cause:
        raise Invalid(f"The body is not JSON: {cause}") from cause
    _walk(value)
    return value


def _walk(root: Any) -> None:
    level, depth, n_nodes = [root], 0, 0
    while level:
        depth += 1
        n_nodes += len(level)
        if depth > MAX_JSON_DEPTH:
            raise Invalid(f"The body is nested deeper than {MAX_JSON_DEPTH} levels.")
        if n_nodes > MAX_JSON_NODES:
            raise Invalid(f"The body has more than {MAX_JSON_NODES} values.")
        below: list[Any] = []
        for value in level:
            match value:
                case dict():
                    below.extend(value)
                    below.extend(value.values())
                case list():
                    below.extend(value)
                case _:
                    _check_scalar(value)
        level = below


def _check_scalar(value: Any) -> None:
    match value:
        case str() if "\0" in value:
            raise Invalid("The body holds a NUL character.")
        case float() if not math.isfinite(value):
            raise Invalid("The body holds a number that is too large.")
        case int() if value.bit_length() > MAX_INT_BITS:
            raise Invalid("The body holds a number that is too large.")
        case _:
            pass
