"""The vocabulary of a session: facts, deltas, records, cursors, pages.

Facts are past tense, frozen, and complete: a session is the fold of its facts and nothing else
(`agent.context`). Deltas are a preview of a fact to come; they are addressed, never stored.
Other wire vocabularies are projections of this one.

A *turn* runs from a command to the next resting point. `UserMessage`, `ApprovalDecided`,
`CompactionRequested` and `SeedRequested` each open a turn of their own, numbered from 1 and rising
for ever; commands that arrive while a turn runs wait in order. Every turn that was opened ends with
exactly one `TurnEnded`. Turn 0 is "outside any turn".
"""

from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from agent.spec import AgentSpec

Outcome = Literal["ok", "error", "denied", "cancelled", "unknown"]
"""`unknown`: the call had started and its process died; it may or may not have happened."""
PassivationReason = Literal["idle", "capacity", "memory", "shutdown", "rolled"]
"""The last two come in the middle of a turn, too. `rolled`: a newer version takes over."""
EndReason = Literal["done", "interrupted", "limit", "failed", "approval"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCall(Frozen):
    tool_call_id: str
    tool: str
    arguments: str
    """The JSON text as the model wrote it: it may not parse."""


class Usage(Frozen):
    """Tokens of one model call, or summed over many."""

    prompt_tokens: int = 0
    """Includes cached ones."""
    completion_tokens: int = 0
    """Includes reasoning ones."""
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
        )


class Ask(Frozen):
    """A tool call that waits for a person."""

    tool_call_id: str
    tool: str
    arguments: str
    reason: str = ""


class Decision(Frozen):
    tool_call_id: str
    decision: Literal["approve", "reject", "edit"]
    arguments: str | None = None
    """JSON text, for `edit`: what runs instead. The model's own arguments stay in AssistantMessage."""
    feedback: str | None = None


class PlanItem(Frozen):
    id: str
    content: str
    status: Literal["pending", "in_progress", "completed"] = "pending"


class Fact(Frozen):
    """Something that happened. Subclasses carry a `type` literal, which is the wire name."""

    turn: int = 0


class Command(Fact):
    """A fact that a client's command made. Its key answers a repetition of the command."""

    message_id: str | None = None
    """The client's idempotency key: unique in a session."""


class SessionOpened(Command):
    type: Literal["session_opened"] = "session_opened"
    session_id: str
    user_id: str
    agent: str
    model: str
    title: str | None = None
    metadata: dict[str, Any] = {}
    spec: AgentSpec
    """Snapshot: a later change of configuration does not change a session. Never on the wire."""


class Activated(Fact):
    type: Literal["activated"] = "activated"
    epoch: int
    reason: Literal["opened", "woken", "recovered"]
    """`recovered`: the incarnation before ended without saying so."""


class UserMessage(Command):
    """Opens a turn."""

    type: Literal["user_message"] = "user_message"
    text: str


class AssistantMessage(Fact):
    type: Literal["assistant_message"] = "assistant_message"
    part_id: str
    """The deltas with this part_id were its preview; other parts of the same turn that never got
    a message were abandoned."""
    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str
    """The provider's, or `interrupted`."""
    model: str


class ModelCalled(Fact):
    type: Literal["model_called"] = "model_called"
    model: str
    kind: Literal["main", "compaction", "seed"] = "main"
    usage: Usage | None
    """None: the provider did not report it (a call that was interrupted or broke)."""
    cost_usd: float | None
    """None: no price is known for this model, or no usage."""
    latency_ms: int
    first_token_ms: int | None = None
    n_retries: int = 0
    fault: str | None = None
    """The fault's code when the call failed."""


class ToolStarted(Fact):
    type: Literal["tool_started"] = "tool_started"
    tool_call_id: str
    tool: str
    arguments: str
    """What runs: the edited arguments where a person edited them."""


class ToolFinished(Fact):
    type: Literal["tool_finished"] = "tool_finished"
    tool_call_id: str
    tool: str
    outcome: Outcome
    text: str
    """What the model is told."""
    duration_ms: int = 0


class ApprovalRequested(Fact):
    type: Literal["approval_requested"] = "approval_requested"
    asks: tuple[Ask, ...]


class ApprovalDecided(Command):
    """Opens a turn. Calls without a decision stay pending."""

    type: Literal["approval_decided"] = "approval_decided"
    decisions: tuple[Decision, ...]


class InterruptRequested(Command):
    """`turn` is the turn to end."""

    type: Literal["interrupt_requested"] = "interrupt_requested"


class PlanUpdated(Fact):
    type: Literal["plan_updated"] = "plan_updated"
    items: tuple[PlanItem, ...]


class ModelSwitched(Command):
    type: Literal["model_switched"] = "model_switched"
    model: str


class CompactionRequested(Command):
    """Opens a turn."""

    type: Literal["compaction_requested"] = "compaction_requested"


class Compacted(Fact):
    """From here on the prompt shows `summary` in place of everything up to record `upto`."""

    type: Literal["compacted"] = "compacted"
    upto: int
    """The seq of the last record that the summary stands for, in the order of the view."""
    summary: str


class CompactionFailed(Fact):
    type: Literal["compaction_failed"] = "compaction_failed"
    code: str
    detail: str


class SeedRequested(Command):
    """Opens a turn. Earlier messages, to be told to the model as one summary."""

    type: Literal["seed_requested"] = "seed_requested"
    messages: tuple[dict[str, Any], ...]
    """OpenAI chat format, the well-formed ones."""
    n_dropped: int
    """Malformed entries."""


class Seeded(Fact):
    type: Literal["seeded"] = "seeded"
    summary: str
    n_messages: int
    n_dropped: int
    fallback: bool = False
    """The model could not summarise; the summary is a plain digest of the messages."""


class Rewound(Command):
    """Turns after `to` leave the view. The facts stay."""

    type: Literal["rewound"] = "rewound"
    to: int
    """The last turn that stays in the view; 0: none."""
    n_messages: int
    """Visible messages afterwards, so that a list needs no fold."""


class SandboxOpened(Fact):
    type: Literal["sandbox_opened"] = "sandbox_opened"
    kind: str
    latency_ms: int


class SandboxClosed(Fact):
    type: Literal["sandbox_closed"] = "sandbox_closed"
    reason: str
    unsaved: bool = False
    """The workspace may have changed since it was last saved: other nodes do not have that."""


class WorkspaceSaved(Fact):
    """The workspace, as it was when the session last came to rest, is where other nodes find it."""

    type: Literal["workspace_saved"] = "workspace_saved"
    snapshot_id: str
    n_files: int
    n_bytes: int
    n_skipped: int = 0
    """Files that are not in it: over a limit, or no regular files."""
    skipped: tuple[str, ...] = ()
    """The first of them, relative to the workspace."""
    copy_id: str
    """Which node's copy of the workspace it was: the current one, until another is told of."""


class WorkspaceRestored(Fact):
    """The workspace was not on this node, or older than its snapshot, and was made from it."""

    type: Literal["workspace_restored"] = "workspace_restored"
    snapshot_id: str | None
    """None: there was none that could be read. The workspace is empty, or an old copy that lay here."""
    n_files: int
    n_bytes: int
    n_missing: int = 0
    """Files that are known to be lost."""
    detail: str | None = None
    """What is lost, for the model and for a person. None: nothing that is known of."""
    copy_id: str
    """The copy that was made, and is the current one from here on."""


class TurnEnded(Fact):
    type: Literal["turn_ended"] = "turn_ended"
    reason: EndReason
    code: str | None = None
    """For `failed` and `limit`: a fault's code or the limit's name."""
    detail: str | None = None
    """A sentence for a person."""


class Passivated(Fact):
    """A turn that is open goes on in the next incarnation."""

    type: Literal["passivated"] = "passivated"
    reason: PassivationReason


class SessionClosed(Command):
    type: Literal["session_closed"] = "session_closed"
    reason: str = "asked"


AnyFact = Annotated[
    SessionOpened | Activated | UserMessage | AssistantMessage | ModelCalled | ToolStarted
    | ToolFinished | ApprovalRequested | ApprovalDecided | InterruptRequested | PlanUpdated
    | ModelSwitched | CompactionRequested | Compacted | CompactionFailed | SeedRequested | Seeded
    | Rewound | SandboxOpened | SandboxClosed | WorkspaceSaved | WorkspaceRestored | TurnEnded | Passivated | SessionClosed,
    Field(discriminator="type"),
]  # fmt: skip
FACT: TypeAdapter[AnyFact] = TypeAdapter(AnyFact)

TURN_OPENERS = (UserMessage, ApprovalDecided, CompactionRequested, SeedRequested)
TurnOpener = Annotated[
    UserMessage | ApprovalDecided | CompactionRequested | SeedRequested,
    Field(discriminator="type"),
]


class Record(NamedTuple):
    """A fact with its place in the journal."""

    seq: int
    """Rises by one per session, from 1, for ever."""
    epoch: int
    at: datetime
    """Aware, UTC."""
    fact: Any
    """One of AnyFact."""


def wire(record: Record) -> dict[str, Any]:
    """The record as readers outside get it: its own fields beside `seq` and `at`."""
    body = record.fact.model_dump(mode="json", exclude=_NOT_ON_THE_WIRE)
    return {"seq": record.seq, "at": record.at.isoformat(), **body}


_NOT_ON_THE_WIRE = {"spec"}
"""The system prompt and the policy are the operator's, not the user's."""


class TextDelta(NamedTuple):
    """The piece of part `part_id` that begins at character `offset`."""

    turn: int
    part_id: str
    offset: int
    text: str


class ToolOutputDelta(NamedTuple):
    turn: int
    tool_call_id: str
    offset: int
    text: str


Delta = TextDelta | ToolOutputDelta


class Cursor(NamedTuple):
    """A place in a session's stream: everything up to here was seen.

    `seq` is the last fact seen; `live` counts what the incarnation `epoch` has shown, deltas too.
    """

    seq: int = 0
    epoch: int = 0
    live: int = 0

    def __str__(self) -> str:
        return f"{self.seq}.{self.epoch}.{self.live}"

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """Read the wire form, "{seq}.{epoch}.{live}".

        Raises:
            ValueError: not three non-negative numbers.
        """
        numbers = [int(part) for part in text.split(".")]
        if len(numbers) != len(cls._fields) or any(not 0 <= n < 2**63 for n in numbers):
            raise ValueError(text)
        return cls(*numbers)


class Frame(NamedTuple):
    """One event as the wire shows it, encoded once where the session lives."""

    cursor: str
    event: str
    """A fact's type, `text_delta` or `tool_output_delta`."""
    turn: int
    data: str
    """One line of JSON."""


class Page(NamedTuple):
    """What a reader gets at a time. Read on from `cursor`, also when `frames` is empty."""

    frames: tuple[Frame, ...]
    cursor: Cursor
    end: bool = False
    """Nothing will ever follow: the turn that was asked for has ended, or the session is gone."""
