"""What the edge sees of the cluster: principals, commands, views, faults, and `Sessions`.

Two implementations, one contract suite (`tests/contracts/test_sessions.py`): `actors.client` over Ray,
`actors.local` in one process. Every call checks the owner; a foreign or unknown session is `NotFound`.
A call that raises has changed nothing, unless its fault says that it is not known (`Unavailable`).
"""

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import ConfigDict, Field

from agent.events import Cursor, Decision, Frozen, Page, Usage
from agent.faults import Fault

MAX_TEXT_CHARS = 100_000
"""Of one message. Above it is TooLarge."""

Status = Literal["idle", "running", "waiting_approval", "passive", "closed"]


class NotFound(Fault):
    code = "not_found"


class Conflict(Fault):
    """The session is not in a state for this command; the sentence says why."""

    code = "conflict"


class TooLarge(Fault):
    code = "too_large"


class Invalid(Fault):
    """The command can never be carried out (an index out of range, an unknown model)."""

    code = "invalid"


class AtCapacity(Fault):
    """Fields: `scope` ("global" | "per_user"), `live`, `limit`, `retry_after_s`."""

    code = "at_capacity"


class QuotaExceeded(Fault):
    """Fields: `group`, `limit`, `retry_after_s` (to the next day, UTC)."""

    code = "quota"


class QueueFull(Fault):
    """As many wait already as may; nothing was taken. Fields: `limit`, `retry_after_s`."""

    code = "queue_full"


class Unavailable(Fault):
    """The cluster did not answer in time, or died meanwhile. Repeat with the same `message_id`."""

    code = "unavailable"


class Moved(Fault):
    """The session does not live here (any more). Never leaves floor 2: routes are asked again."""

    code = "moved"


class Principal(NamedTuple):
    """Who calls: made from the bearer token by the edge, never from a body."""

    user_id: str


class Open(Frozen):
    """Open a session. With a `message_id`, repeating it by the same user is the same session."""

    agent: str | None = None
    """None: the configured default."""
    model: str | None = None
    title: str | None = Field(default=None, max_length=200)
    seed_messages: tuple[Any, ...] = ()
    metadata: dict[str, Any] = {}
    user_token: str | None = Field(default=None, repr=False)
    """The user's token for tools. In memory only: the manager's, which hands it on when the session
    wakes, and the session's."""
    message_id: str | None = None


class SessionCommand(Frozen):
    """Asks a session for something. Repeating a `message_id` returns the first answer; using one
    that belonged to another kind of command is Conflict."""

    message_id: str | None = None


class SendMessage(SessionCommand):
    """Open a turn with a text. Queued behind a running one. Pending approvals are denied first."""

    text: str


class Decide(SessionCommand):
    """Answer pending approvals, some or all. Conflict: a call is not pending. Invalid: edited
    arguments are no JSON object, or one call twice."""

    decisions: tuple[Decision, ...] = Field(min_length=1)


class Interrupt(SessionCommand):
    """End the running turn; queued ones go on. Conflict: none runs."""


class Undo(SessionCommand):
    """Take the last user message and all after it out of the view. Conflict: none is there, or a
    turn runs."""


class Truncate(SessionCommand):
    """Cut the view just before the visible user message of this index. Invalid: out of range.
    Conflict: a turn runs."""

    user_message_index: int


class Compact(SessionCommand):
    """Open a turn that summarises the older conversation. Conflict: there is nothing to compact."""


class SwitchModel(SessionCommand):
    """Use another model from the next model call on."""

    model: str


class Seed(SessionCommand):
    """Open a turn that tells the session about earlier messages, as one summary. Malformed entries
    are dropped and counted. Invalid: no well-formed one is left."""

    messages: tuple[Any, ...]


class Close(SessionCommand):
    """Come to rest (a running turn is interrupted, queued ones too), write the trajectory, free the
    slot. For ever: afterwards only reads and delete. Conflict: closed already."""


AnyCommand = (
    SendMessage | Decide | Interrupt | Undo | Truncate | Compact | SwitchModel | Seed | Close
)


class Accepted(NamedTuple):
    """The command's fact is durable."""

    turn: int
    """The turn that the command opened or ended; 0 when it is about none."""
    cursor: str
    """Read on from here: the command's own fact is before it."""
    n_messages: int | None = None
    """Seed: the well-formed ones."""


class SessionView(Frozen):
    """A session as its owner sees it. No system prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    session_id: str
    user_id: str
    title: str | None
    model: str
    agent: str
    status: Status
    created_at: datetime
    updated_at: datetime
    n_messages: int
    pending_approval: tuple["PendingApproval", ...] | None
    usage: Usage
    spend_usd: float
    n_unpriced: int
    """Model calls that `spend_usd` does not count: no price is known."""
    cursor: str
    """The head: reading from here shows only what comes."""


class PendingApproval(Frozen):
    tool_call_id: str
    tool: str
    arguments: Any
    """The parsed JSON, or the text where it does not parse."""
    reason: str = ""


class SessionList(NamedTuple):
    data: tuple[SessionView, ...]
    next: str | None


class Count(Frozen):
    live: int
    limit: int


class LaneCount(Frozen):
    live: int


class CapacityView(Frozen):
    live: int
    """Slots taken: reserved, live and passivating sessions of all lanes."""
    limit: int
    warm: int
    user: Count
    lanes: dict[Literal["interactive", "bulk"], LaneCount]


class Sessions(Protocol):
    async def open(self, who: Principal, command: Open) -> SessionView:
        """
        Raises:
            AtCapacity, Invalid, QuotaExceeded, TooLarge, Unavailable
        """
        ...

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        """Carry out a command on a session, waking it if need be. Durable when it returns.

        Raises:
            AtCapacity, Conflict, Invalid, NotFound, QueueFull, QuotaExceeded, TooLarge,
            Unavailable
        """
        ...

    def pages(
        self,
        who: Principal,
        session_id: str,
        cursor: Cursor,
        *,
        turn: int | None = None,
        follow: bool = True,
    ) -> AsyncGenerator[Page, None]:
        """What happened after `cursor`, and with `follow` what happens. Never wakes a session.

        Every fact once and in order. The first page comes at once, and when nothing happens one at
        least every 15 s; both may be empty.
        Ends after a page with `end` (the turn ended, the session closed or was deleted), at the head
        without `follow`, or when the cluster goes away: the reader comes back with its last cursor.
        Whoever leaves earlier calls `aclose()`, which ends what the reading costs.

        Raises:
            NotFound: at the first step.
            QueueFull: the session has `max_readers` already. Later only when a reader's place was
                taken while the session moved: come back with the last cursor.
        """
        ...

    async def view(self, who: Principal, session_id: str) -> SessionView: ...

    async def owned(self, who: Principal, *, limit: int, after: str | None) -> SessionList:
        """The caller's own, newest first.

        Raises:
            Invalid: `after` is not a `next` of this method.
        """
        ...

    async def messages(self, who: Principal, session_id: str) -> list[dict[str, Any]]:
        """The view in OpenAI chat format, without the system prompt."""
        ...

    async def trajectory(self, who: Principal, session_id: str) -> dict[str, Any]: ...

    async def delete(self, who: Principal, session_id: str) -> None:
        """End everything the session runs; remove its records, workspace and trajectory."""
        ...

    async def capacity(self, who: Principal) -> CapacityView: ...

    async def ready(self) -> bool:
        """Whether sessions can be opened: the manager and the journal answer."""
        ...
