"""The fold of a session's records: what is owed next, what the model is told, what a person sees.

`Context` changes in one place, `fold`, one record at a time, in journal order; everything else is a
question. It does no I/O and knows no clock. Behaviours of the agent are states in here; the loop
(`agent.loop`) only does what `owed` says.

The *view* (`agent.view`) is the list of entries that count: rewound turns leave it. Commands that
arrive while a turn runs wait in `queue` and enter the view when their turn begins.
"""

from collections import deque
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from agent import gate
from agent.events import (
    TURN_OPENERS,
    Activated,
    ApprovalDecided,
    ApprovalRequested,
    Ask,
    AssistantMessage,
    Command,
    Compacted,
    CompactionFailed,
    CompactionRequested,
    Decision,
    Fact,
    InterruptRequested,
    ModelCalled,
    ModelSwitched,
    Outcome,
    Passivated,
    PlanItem,
    PlanUpdated,
    Record,
    Rewound,
    SandboxClosed,
    SandboxOpened,
    Seeded,
    SeedRequested,
    SessionClosed,
    SessionOpened,
    ToolFinished,
    ToolStarted,
    TurnEnded,
    TurnOpener,
    UserMessage,
    WorkspaceRestored,
)
from agent.faults import ContextOverflow, ModelLost
from agent.held import Held
from agent.owed import (
    CallModel,
    Compact,
    Due,
    End,
    Owed,
    RequestApproval,
    Rest,
    RunTools,
    Settle,
    Summarise,
)
from agent.spec import AgentSpec
from agent.view import (
    CHARS_PER_TOKEN,
    NOT_EXECUTED,
    AssistantEntry,
    Call,
    Entry,
    UserEntry,
    chat,
    handover,
    tokens_of,
)

MAX_ANSWERS = 256
"""A client repeats what it sent a moment ago; for the rest the journal is asked."""
MAX_LOST = 3
"""Calls lost in a row that are made again: a gateway that dies more often needs a person."""


class Answer(NamedTuple):
    """What a command was answered, for its repetition."""

    kind: str
    """The fact's type."""
    turn: int
    seq: int
    n_messages: int | None = None
    """Of a seed: the well-formed ones."""

    @classmethod
    def of(cls, record: Record) -> "Answer":
        fact = record.fact
        n_messages = len(fact.messages) if isinstance(fact, SeedRequested) else None
        return cls(fact.type, fact.turn, record.seq, n_messages)


class Opening(NamedTuple):
    seq: int
    fact: TurnOpener


SUPERSEDED = "The user did not decide on this call and wrote a new message instead. It did not run."
INTERRUPTED = "Interrupted by the user."
UNKNOWN = (
    "The process that ran this call died before it could report. The call may have had its effect,"
    " in part or in whole, or none. Check before you repeat it."
)


NEW_SHELL = (
    "[This is a new shell: the working directory, variables and background processes of the one"
    " before are gone. Files of the workspace are there, unless a note before this one says"
    " what is lost.]"
)


class Faded(NamedTuple):
    """A message of the view that a compaction replaced, without its text."""

    turn: int
    is_user: bool

    @classmethod
    def of(cls, entry: Entry) -> "Faded":
        return cls(entry.turn, isinstance(entry, UserEntry))


@dataclass(eq=False)
class Folded:
    """What the records of a session have come to. A checkpoint holds all of it."""

    model: str = ""
    epoch: int = 0
    head: int = 0
    closed: bool = False
    rested_by: Passivated | SessionClosed | None = None
    """The last record's fact where it says that an incarnation ended on purpose."""
    view: list[Entry] = field(default_factory=list[Entry])
    """After `faded`."""
    faded: list[Faded] = field(default_factory=list[Faded])
    """The view's first messages, where the context began from a checkpoint."""
    faded_ask: str | None = None
    """The newest user message of `faded`."""
    call_ids: set[str] = field(default_factory=set[str])
    """Of every call that was ever proposed, rewound ones too."""
    plan: tuple[PlanItem, ...] = ()
    sandbox_open: bool = False
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    """The newest MAX_ANSWERS, by message_id. The journal knows all."""
    n_answers: int = 0
    """Of the whole session."""
    n_turns: int = 0
    turn: Opening | None = None
    queue: deque[Opening] = field(default_factory=deque[Opening])
    n_steps: int = 0
    """Model calls of the running turn that gave a message."""
    n_calls: int = 0
    """Model calls of the session: addresses of parts."""
    held: Held = field(default_factory=Held)
    recovered_at: list[datetime] = field(default_factory=list[datetime])
    """When the running turn's process was found dead."""
    _interrupted: set[int] = field(default_factory=set[int])
    compactions: list[tuple[int, Compacted]] = field(default_factory=list[tuple[int, Compacted]])
    _compaction_done: bool = False
    _compaction_failed: CompactionFailed | None = None
    _seeded: bool = False
    _overflowed: bool = False
    _n_lost: int = 0
    """Model calls in a row that were lost on the way."""
    _tokens: int = 0


class Saved(NamedTuple):
    opened: SessionOpened
    folded: Folded


SAVED = TypeAdapter(Saved)


class Context(Folded):
    """A session as its records tell it."""

    def __init__(self, idempotent: Callable[[str], bool], window_tokens: int = 128_000) -> None:
        super().__init__()
        self._idempotent = idempotent
        self.window_tokens = window_tokens
        self.opened: SessionOpened
        self.boundary = 0
        """The seq after which the record before it matters less: of the newest compaction, or of a
        rewind behind one."""
        self.is_short = False
        """A rewind went behind `faded`: what it brought back is only in the journal."""

    # -- checkpoints -------------------------------------------------------------------------

    def checkpointed(self) -> str:
        """The context as one text, its entries before the newest compaction faded."""
        after = self._after_cut()
        cut = self.view[: len(self.view) - len(after)]
        state = copy(self)
        state.view = after
        state.faded = [*self.faded, *(Faded.of(entry) for entry in cut if not _is_seed(entry))]
        state.faded_ask = self._ask_before(after)
        state.compactions = self.compactions[-1:]
        return SAVED.dump_json(Saved(self.opened, state)).decode()

    def restore(self, text: str) -> None:
        """Be what `checkpointed` gave. For a context that is new.

        Raises:
            ValueError: the text is not such a one; nothing has changed.
        """
        saved = SAVED.validate_json(text)
        self.opened = saved.opened
        self._become(saved.folded)
        self.boundary = self.head

    def fold_anew(self, records: Iterable[Record]) -> None:
        """Be what all the records of the session tell, whatever this was before."""
        whole = Context(self._idempotent, self.window_tokens)
        whole.fold(records)
        self._become(whole)
        self.boundary, self.is_short = whole.boundary, False

    def _become(self, folded: Folded) -> None:
        for each in fields(Folded):
            setattr(self, each.name, getattr(folded, each.name))

    # -- the fold ----------------------------------------------------------------------------

    def fold(self, records: Iterable[Record]) -> None:
        for record in records:
            fact = record.fact
            self.head = record.seq
            self.rested_by = fact if isinstance(fact, Passivated | SessionClosed) else None
            if isinstance(fact, Command) and fact.message_id is not None:
                self._remember(fact.message_id, Answer.of(record))
            if isinstance(fact, TURN_OPENERS):
                self.n_turns = max(self.n_turns, fact.turn)
                self.queue.append(Opening(record.seq, fact))
            else:
                self._fold_one(record)
            self.held = self.held.after(fact)
            if self.turn is None and self.queue:
                self._begin(self.queue.popleft())

    def _remember(self, message_id: str, answer: Answer) -> None:
        self.answers[message_id] = answer
        self.n_answers += 1
        if len(self.answers) > MAX_ANSWERS:
            del self.answers[next(iter(self.answers))]

    def _fold_one(self, record: Record) -> None:  # noqa: C901, PLR0912, PLR0915 - a flat table, a case per fact
        match record.fact:
            case SessionOpened() as fact:
                self.opened = fact
                self.model = fact.model
                self._tokens = self._estimate()
            case Activated(epoch=epoch, reason=reason):
                self.epoch = epoch
                if reason == "recovered" and self.turn is not None:
                    self.recovered_at.append(record.at)
            case AssistantMessage() as fact:
                entry = AssistantEntry.of(fact, record.seq)
                self.view.append(entry)
                self.call_ids |= entry.calls.keys()
                self.n_steps += 1
                # The conversation went on, so a long turn may be compacted again. Not after a failure:
                # that would fail at every step.
                self._compaction_done = self._compaction_failed is not None
            case ModelCalled() as fact:
                self._fold_model_call(fact)
            case ToolStarted() as fact:
                call = self._call(fact.tool_call_id)
                call.started_epoch, call.arguments = record.epoch, fact.arguments
            case ToolFinished() as fact:
                self._call(fact.tool_call_id).result = fact
                self._tokens += len(fact.text) // CHARS_PER_TOKEN
            case ApprovalRequested(asks=asks):
                for ask in asks:
                    self._call(ask.tool_call_id).asked = True
            case InterruptRequested(turn=turn):
                self._interrupted.add(turn)
            case PlanUpdated(items=items):
                self.plan = items
            case ModelSwitched(model=model):
                self.model = model
            case Compacted() as fact:
                self.compactions.append((fact.turn, fact))
                self.boundary = record.seq
                self._compaction_done, self._overflowed = True, False
                self._tokens = self._estimate()
            case CompactionFailed() as fact:
                self._compaction_done, self._compaction_failed = True, fact
            case Seeded() as fact:
                self.view.append(UserEntry(record.seq, fact.turn, fact.summary, seed=True))
                self._seeded = True
            case Rewound(to=to):
                self._rewind(to, record.seq)
            case SandboxOpened(turn=turn):
                self.sandbox_open = True
                if self.held.was_used:
                    self.view.append(UserEntry(record.seq, turn, NEW_SHELL, seed=True))
            case WorkspaceRestored(turn=turn, detail=str(detail)):
                self.view.append(UserEntry(record.seq, turn, f"[{detail}]", seed=True))
            case SandboxClosed():
                self.sandbox_open = False
            case TurnEnded():
                self.turn = None
            case SessionClosed():
                self.closed = True
            case _:
                pass

    def _rewind(self, to: int, seq: int) -> None:
        self.view = [entry for entry in self.view if entry.turn <= to]
        kept = [pair for pair in self.compactions if pair[0] <= to]
        if len(kept) < len(self.compactions):
            self.compactions, self.boundary = kept, seq
            self.is_short = self.is_short or (bool(self.faded) and not kept)
        self._tokens = self._estimate()

    def _fold_model_call(self, fact: ModelCalled) -> None:
        self.n_calls += 1
        if fact.kind == "main":
            self._overflowed = fact.fault == ContextOverflow.code
            self._n_lost = self._n_lost + 1 if fact.fault == ModelLost.code else 0
            if fact.usage is not None:
                self._tokens = fact.usage.prompt_tokens + fact.usage.completion_tokens

    def _begin(self, opening: Opening) -> None:
        self.turn = opening
        self.n_steps = self._n_lost = 0
        self._compaction_done = self._seeded = self._overflowed = False
        self._compaction_failed = None
        self.recovered_at = []
        match opening.fact:
            case UserMessage(text=text, turn=turn):
                self.view.append(UserEntry(opening.seq, turn, text))
                self._tokens += len(text) // CHARS_PER_TOKEN
            case ApprovalDecided(decisions=decisions):
                for decision in decisions:
                    call = self._call(decision.tool_call_id)
                    call.decision = decision
                    if decision.decision == "edit" and decision.arguments is not None:
                        call.arguments = decision.arguments
            case _:
                pass

    def _call(self, tool_call_id: str) -> Call:
        for entry in reversed(self.view):
            if isinstance(entry, AssistantEntry) and tool_call_id in entry.calls:
                return entry.calls[tool_call_id]
        raise KeyError(tool_call_id)

    # -- what is owed ------------------------------------------------------------------------

    def owed(self) -> Owed:
        """What takes the session towards its next resting point. Pure; doing it adds facts."""
        if self.turn is None or self.closed:
            return Rest()
        open_calls = self._open_calls()
        if isinstance(self.turn.fact, UserMessage) and self._asked_before(self.turn.fact.turn):
            asked = [call for call in open_calls if call.asked]
            if settle := (
                self._settled(asked, "denied", SUPERSEDED)
                or self._settled(open_calls, "cancelled", NOT_EXECUTED)
            ):
                return settle
        if self.is_interrupted:
            running = [call for call in open_calls if not (call.asked and call.decision is None)]
            return self._settled(running, "cancelled", INTERRUPTED) or End("interrupted")
        match self.turn.fact:
            case SeedRequested() as seed:
                return End("done") if self._seeded else Summarise(seed)
            case CompactionRequested():
                return self._owed_by_compaction()
            case _:
                return self._owed_by_calls(open_calls) or self._owed_by_view()

    def owed_after(self, answer: AssistantMessage) -> Owed:
        """What is owed once `answer` is a fact too."""
        self.view.append(AssistantEntry.of(answer, self.head + 1))
        try:
            return self.owed()
        finally:
            self.view.pop()

    def _last_assistant(self) -> AssistantEntry | None:
        return next((e for e in reversed(self.view) if isinstance(e, AssistantEntry)), None)

    def _open_calls(self) -> list[Call]:
        last = self._last_assistant()
        return last.unsettled if last else []

    def _asked_before(self, turn: int) -> bool:
        last = self._last_assistant()
        return last is not None and last.turn < turn

    def _owed_by_compaction(self) -> Owed:
        if failed := self._compaction_failed:
            return End("failed", failed.code, failed.detail)
        upto = 0 if self._compaction_done else self.cut(keep_tokens=0)
        return Compact(upto) if upto else End("done")

    def _owed_by_calls(self, calls: list[Call]) -> Owed | None:
        """Crash remnants and refusals are settled first, then what may run runs, then a person is
        asked about the rest."""
        due: list[Due] = []
        asks: list[Ask] = []
        refused: list[ToolFinished] = []
        for call in calls:
            verdict = gate.judge(self.spec.approval, call.proposed.tool, call.arguments)
            if self._may_have_happened(call):
                refused.append(self._finished(call, "unknown", UNKNOWN))
            elif call.decision is not None and call.decision.decision == "reject":
                refused.append(self._finished(call, "denied", _rejection(call.decision)))
            elif verdict.action == "deny":
                refused.append(self._finished(call, "denied", _denial(verdict.reason)))
            elif call.decision is not None or verdict.action == "allow":
                due.append(call.due)
            else:
                asks.append(Ask(**call.due._asdict(), reason=verdict.reason))
        if refused:
            return Settle(tuple(refused))
        if due:
            return RunTools(tuple(due))
        if asks and all(call.asked for call in calls):
            return End("approval")
        return RequestApproval(tuple(asks)) if asks else None

    def _owed_by_view(self) -> Owed:
        last = self.view[-1] if self.view else None
        if isinstance(last, AssistantEntry) and not last.calls:
            return End("done")
        if beyond := self._beyond_asking():
            return beyond
        if self.n_steps >= self.spec.limits.max_steps:
            return End("limit", "max_steps", f"The turn made {self.n_steps} model calls.")
        limit = self.spec.compaction.at_fraction * self.window_tokens
        if (self._overflowed or self._tokens >= limit) and not self._compaction_done:
            if self.can_compact() and (upto := self.cut(keep_tokens=self._keep_tokens())):
                return Compact(upto)
            if self._overflowed:
                return End(
                    "failed", "context_overflow", "The message does not fit the model's window."
                )
        return CallModel()

    def _beyond_asking(self) -> End | None:
        """The end of a turn whose model call would only fail again."""
        if self._n_lost > MAX_LOST:
            return End(
                "failed",
                ModelLost.code,
                f"The model gateway was lost {self._n_lost} times in a row.",
            )
        if self._overflowed and self._compaction_done:
            return End(
                "failed", "context_overflow", "The conversation does not fit the model's window."
            )
        return None

    def _keep_tokens(self) -> int:
        """How much of the newest conversation a compaction leaves: its share of the window, and less
        where the provider found the prompt too long though we counted it short."""
        share = int(self.spec.compaction.keep_fraction * self.window_tokens)
        return min(share, self._estimate() // 2) if self._overflowed else share

    def _settled(self, calls: list[Call], outcome: Outcome, text: str) -> Settle | None:
        return Settle(tuple(self._finished(c, outcome, text) for c in calls)) if calls else None

    def _finished(self, call: Call, outcome: Outcome, text: str) -> ToolFinished:
        return ToolFinished(
            turn=self.turn.fact.turn if self.turn else 0,
            tool_call_id=call.proposed.tool_call_id,
            tool=call.proposed.tool,
            outcome=outcome,
            text=text,
        )

    # -- questions ---------------------------------------------------------------------------

    @property
    def spec(self) -> AgentSpec:
        return self.opened.spec

    @property
    def open_turns(self) -> list[int]:
        """Running and queued ones, in order."""
        running = [self.turn] if self.turn else []
        return [opening.fact.turn for opening in (*running, *self.queue)]

    @property
    def is_interrupted(self) -> bool:
        """Whether the running turn is to end."""
        return self.turn is not None and self.turn.fact.turn in self._interrupted

    def has_ended(self, turn: int) -> bool:
        """Whether the turn was opened and is over: turns end in the order of their numbers."""
        return turn <= self.n_turns and turn not in self.open_turns

    def abandon(self, code: str, detail: str) -> list[Fact]:
        """The facts that end the running turn when the loop itself failed."""
        calls = [call for call in self._open_calls() if not call.asked]
        settled = [
            self._finished(call, "unknown", UNKNOWN)
            if self._may_have_happened(call)
            else self._finished(call, "error", detail)
            for call in calls
        ]
        ended = TurnEnded(turn=self.open_turns[0], reason="failed", code=code, detail=detail)
        return [*settled, ended]

    def _may_have_happened(self, call: Call) -> bool:
        """It had started, nobody told how it ended, and that matters."""
        return bool(call.started_epoch) and not self._idempotent(call.proposed.tool)

    @property
    def pending(self) -> dict[str, Call]:
        """Calls that wait for a decision which nobody has sent yet."""
        decided = {
            decision.tool_call_id
            for opening in self.queue
            if isinstance(opening.fact, ApprovalDecided)
            for decision in opening.fact.decisions
        }
        return {
            call.proposed.tool_call_id: call
            for call in self._open_calls()
            if call.asked and call.decision is None and call.proposed.tool_call_id not in decided
        }

    @property
    def user_turns(self) -> list[int]:
        """The turns of the visible user messages, which `truncate` counts from 0."""
        return [said.turn for said in self._said if said.is_user]

    def n_messages_upto(self, turn: int) -> int:
        """Visible user and assistant messages of the view's turns up to `turn`."""
        return sum(said.turn <= turn for said in self._said)

    @property
    def _said(self) -> list[Faded]:
        return [*self.faded, *(Faded.of(entry) for entry in self.view if not _is_seed(entry))]

    def can_compact(self) -> bool:
        return len(self._after_cut()) > 1 and self.cut(keep_tokens=0) > 0

    def cut(self, *, keep_tokens: int) -> int:
        """The seq of the newest entry to summarise so that about `keep_tokens` stay; 0: nothing.

        An entry with unsettled calls always stays, and what follows it: its results are still to come.
        """
        entries = self._after_cut()
        for index, entry in enumerate(entries):
            if isinstance(entry, AssistantEntry) and entry.unsettled:
                entries = entries[:index]
                break
        kept = 0
        while entries and (kept := kept + tokens_of(entries[-1])) <= keep_tokens:
            entries = entries[:-1]
        return entries[-1].seq if entries else 0

    def _after_cut(self) -> list[Entry]:
        if not self.compactions:
            return self.view
        upto = self.compactions[-1][1].upto
        index = next((i for i, e in enumerate(self.view) if e.seq == upto), -1)
        return self.view[index + 1 :]

    def before(self, upto: int) -> list[Entry]:
        """The entries that a compaction up to `upto` summarises."""
        entries = self._after_cut()
        index = next(i for i, e in enumerate(entries) if e.seq == upto)
        return entries[: index + 1]

    @property
    def summary(self) -> str | None:
        """What stands for the entries that were compacted."""
        return self.compactions[-1][1].summary if self.compactions else None

    def _estimate(self) -> int:
        chars = len(self.spec.system_prompt) + len(self.summary or "")
        return chars // CHARS_PER_TOKEN + sum(tokens_of(entry) for entry in self._after_cut())

    # -- projections -------------------------------------------------------------------------

    def prompt(self) -> list[dict[str, Any]]:
        """What the model is told: system prompt, summary, and the view since, repaired."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.spec.system_prompt}]
        after = self._after_cut()
        if self.summary is not None:
            told = handover(self.summary, self._ask_before(after))
            messages.append({"role": "user", "content": told})
        return messages + chat(after)

    def _ask_before(self, after: list[Entry]) -> str | None:
        """The newest user message of the view before its last entries, `after`."""
        cut = self.view[: len(self.view) - len(after)]
        asked = (e for e in reversed(cut) if isinstance(e, UserEntry) and not e.seed)
        return next((entry.text for entry in asked), self.faded_ask)

    def messages(self) -> list[dict[str, Any]]:
        """What a person sees: the whole view, compacted entries too, no system prompt. Of a context
        that was folded from the first record."""
        return chat(self.view)


def _is_seed(entry: Entry) -> bool:
    return isinstance(entry, UserEntry) and entry.seed


def _rejection(decision: Decision) -> str:
    said = f" They said: {decision.feedback}" if decision.feedback else ""
    return f"The user rejected this call. It did not run.{said}"


def _denial(reason: str) -> str:
    return f"The policy does not allow this call. {reason}".strip()
