"""`advance`: the only way a session moves.

Commit, then act, then show. Each pass asks the context what is owed and does that one thing; doing it
commits facts, and the next pass sees them. A crash between any two facts leaves a journal from which
the same loop goes on.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from agent import summaries
from agent.context import Context
from agent.events import (
    ApprovalRequested,
    AssistantMessage,
    Delta,
    Fact,
    ModelCalled,
    TextDelta,
    ToolCall,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    TurnEnded,
)
from agent.faults import ContextOverflow, ModelFault, ModelLost, boundary
from agent.model.contract import Completion, Model, ModelRequest, TextChunk
from agent.owed import (
    CallModel,
    Compact,
    Due,
    End,
    RequestApproval,
    Rest,
    RunTools,
    Settle,
    Summarise,
)
from agent.sandbox.contract import Sandbox
from agent.tools.contract import Tools, ToolScope

MAX_ANSWER_CHARS = 4_000_000
"""Of one model answer: far above any provider's output limit, so only a broken server reaches it."""
MAX_PREVIEW_CHARS = 262_144
"""Of one tool call's live output. The result has the rest, cut by its own rule."""


class Run(Protocol):
    """What the loop needs of the incarnation that runs it (`actors.activation`)."""

    context: Context
    model: Model
    tools: Tools
    user_token: str | None

    def now_s(self) -> float:
        """A monotonic clock."""
        ...

    async def commit(self, *facts: Fact) -> None:
        """Make facts durable, fold them into `context`, show them. In that order, never in part.

        Raises:
            Fenced, JournalFault: the incarnation is over.
        """
        ...

    async def commit_by(self, facts_of: Callable[[], Sequence[Fact]]) -> None:
        """The same for what `facts_of` says when everything asked before is in `context`."""
        ...

    def show(self, delta: Delta) -> None: ...

    async def sandbox(self) -> Sandbox:
        """The session's sandbox, opened at the first use, with its fact."""
        ...

    def is_watched(self) -> bool:
        """Whether somebody may read an answer while it comes."""
        ...

    def is_pausing(self) -> bool:
        """Whether to stop between two steps. An open turn stays open."""
        ...

    async def interruptible(self, step: Coroutine[Any, Any, None]) -> None:
        """Await a step that an interrupt may cancel. Returns when it ended either way."""
        ...


async def advance(run: Run) -> None:
    """Take the session from any state to its next resting point, or until it is to pause.

    Raises:
        Fenced, JournalFault: from a commit; the caller ends the incarnation.
    """
    turn, began_s = 0, 0.0
    while not run.is_pausing():
        owed = run.context.owed()
        if turn != _turn(run):
            turn, began_s = _turn(run), run.now_s()
        if isinstance(owed, CallModel) and _overtime(run, began_s):
            owed = End("limit", "max_turn_s", "The turn took longer than it may.")
        match owed:
            case Rest():
                return
            case Settle(results):
                await run.commit(*results)
            case RunTools(calls):
                await run.interruptible(run_tools(run, calls))
            case CallModel():
                await run.interruptible(call_model(run))
            case Compact(upto):
                await run.interruptible(summaries.compact(run, upto))
            case Summarise(seed):
                await run.interruptible(summaries.seed(run, seed))
            case RequestApproval():
                await run.commit(*_requested(run, owed))
            case End():
                await run.commit(_ended(run, owed))


def _turn(run: Run) -> int:
    return run.context.turn.fact.turn if run.context.turn else 0


def _ended(run: Run, end: End) -> TurnEnded:
    return TurnEnded(turn=_turn(run), **end._asdict())


def _requested(run: Run, request: RequestApproval) -> list[Fact]:
    asked = ApprovalRequested(turn=_turn(run), asks=request.asks)
    return [asked, TurnEnded(turn=_turn(run), reason="approval")]


def _overtime(run: Run, began_s: float) -> bool:
    return run.now_s() - began_s > run.context.spec.limits.max_turn_s


class Part:
    """The preview of an answer while it comes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.turn = _turn(run)
        self.part_id = f"{self.turn}.{run.context.epoch}.{run.context.n_calls}"
        self._pieces: list[str] = []
        self._n_chars = 0
        self.began_s = run.now_s()
        self.first_token_ms: int | None = None

    def add(self, text: str) -> None:
        if self.first_token_ms is None:
            self.first_token_ms = self.elapsed_ms()
        self._run.show(TextDelta(self.turn, self.part_id, self._n_chars, text))
        self._pieces.append(text)
        self._n_chars += len(text)
        if self._n_chars > MAX_ANSWER_CHARS:
            raise ModelFault("The model's answer does not end.")

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def elapsed_ms(self) -> int:
        return round((self._run.now_s() - self.began_s) * 1000)

    def called(self, completion: Completion | None = None, fault: str | None = None) -> ModelCalled:
        return ModelCalled(
            turn=self.turn,
            model=self._run.context.model,
            usage=completion.usage if completion else None,
            cost_usd=completion.cost_usd if completion else None,
            latency_ms=self.elapsed_ms(),
            first_token_ms=self.first_token_ms,
            n_retries=completion.n_retries if completion else 0,
            fault=fault,
        )

    def message(
        self, finish_reason: str, tool_calls: Sequence[ToolCall] = (), reasoning: str = ""
    ) -> AssistantMessage:
        return AssistantMessage(
            turn=self.turn,
            part_id=self.part_id,
            text=self.text,
            reasoning=reasoning,
            tool_calls=tuple(tool_calls),
            finish_reason=finish_reason,
            model=self._run.context.model,
        )


async def call_model(run: Run) -> None:
    """One model call: previews as it streams, then its facts together."""
    part = Part(run)
    try:
        with boundary(ModelFault, "The model call failed."):
            completion = await _completion(run, part)
    except asyncio.CancelledError:
        # What the user saw stays when the user stopped it; an incarnation that ends asks again.
        keep = part.text and run.context.is_interrupted
        partial = [part.message("interrupted")] if keep else []
        await run.commit(part.called(fault="interrupted"), *partial)
        raise
    except (ContextOverflow, ModelLost) as fault:
        await run.commit(part.called(fault=fault.code))  # the context knows what to do about it
    except ModelFault as fault:
        ended = TurnEnded(turn=part.turn, reason="failed", code=fault.code, detail=fault.detail)
        await run.commit(part.called(fault=fault.code), ended)
    else:
        await _answer(run, part, completion)


async def _answer(run: Run, part: Part, completion: Completion) -> None:
    """Commit an answer together with what follows from it at once: the turn's end, the question to a
    person, or the start of its calls, which then run."""
    calls = _with_fresh_ids(run.context, completion.tool_calls, part.part_id)
    message = part.message(completion.finish_reason, calls, completion.reasoning)
    called = part.called(completion)
    due: tuple[Due, ...] = ()

    def facts() -> list[Fact]:
        nonlocal due
        follows: list[Fact] = []
        match run.context.owed_after(message):
            case End() as end:
                follows = [_ended(run, end)]
            case RequestApproval() as request:
                follows = _requested(run, request)
            case RunTools(calls) if not run.is_pausing():
                due = calls
                follows = _started(run, calls)
            case _:
                pass
        return [called, message, *follows]

    await run.commit_by(facts)
    if due:
        await _settled(run, due)


async def _completion(run: Run, part: Part) -> Completion:
    request = ModelRequest(
        model=run.context.model,
        messages=run.context.prompt(),
        tools=run.tools.schemas(),
        session_id=run.context.opened.session_id,
        max_output_tokens=run.context.spec.max_output_tokens,
        temperature=run.context.spec.temperature,
        stream=run.is_watched(),
    )
    async with aclosing(run.model.stream(request)) as stream:
        async for chunk in stream:
            match chunk:
                case TextChunk(text):
                    part.add(text)
                case Completion():
                    return chunk
                case _:
                    pass
    raise ModelFault("The model's answer had no end.")


def _with_fresh_ids(
    context: Context, calls: Sequence[ToolCall], part_id: str
) -> tuple[ToolCall, ...]:
    """Providers number calls per answer, or worse; facts name a call in the whole session."""
    fresh: dict[str, ToolCall] = {}
    for number, call in enumerate(calls):
        call_id = call.tool_call_id
        if call_id in fresh or call_id in context.call_ids:
            call_id = f"{call_id}-{part_id}.{number}"
        fresh[call_id] = call.model_copy(update={"tool_call_id": call_id})
    return tuple(fresh.values())


async def run_tools(run: Run, calls: Sequence[Due]) -> None:
    """Run calls together; each settles by itself, as soon as it is there."""
    await run.commit(*_started(run, calls))
    await _settled(run, calls)


def _started(run: Run, calls: Sequence[Due]) -> list[Fact]:
    return [ToolStarted(turn=_turn(run), **call._asdict()) for call in calls]


async def _settled(run: Run, calls: Sequence[Due]) -> None:
    turn = _turn(run)
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(_run_tool(run, turn, call))
    except BaseExceptionGroup as failed:
        # A tool's own failure is a result; only a commit fails here, and one says it for all.
        raise failed.exceptions[0] from None


async def _run_tool(run: Run, turn: int, call: Due) -> None:
    began_s = run.now_s()
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        if piece := text[: MAX_PREVIEW_CHARS - shown]:
            run.show(ToolOutputDelta(turn, call.tool_call_id, shown, piece))
            shown += len(piece)

    scope = ToolScope(run.context.opened.session_id, run.sandbox, show, run.user_token)
    result = await run.tools.run(call.tool, call.arguments, scope)
    finished = ToolFinished(
        turn=turn,
        tool_call_id=call.tool_call_id,
        tool=call.tool,
        outcome=result.outcome,
        text=result.text,
        duration_ms=round((run.now_s() - began_s) * 1000),
    )
    await run.commit(*(fact.model_copy(update={"turn": turn}) for fact in result.facts), finished)
