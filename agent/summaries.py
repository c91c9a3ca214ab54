"""The two model calls that summarise: compaction of a long session, and earlier messages at its start.

Neither can make a session unusable: a compaction that fails is a fact and the turn goes on or ends with
it; a seed whose summary fails is told as a plain digest.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from agent.agents import prompt
from agent.events import Compacted, CompactionFailed, ModelCalled, Seeded, SeedRequested
from agent.faults import ModelFault, boundary
from agent.model.contract import Completion, ModelRequest
from agent.transcript import render
from agent.view import CHARS_PER_TOKEN, chat

if TYPE_CHECKING:
    from agent.loop import Run

SUMMARY_TOKENS = 4000
"""Limit of a summary: a few per cent of common windows, and more than a hand-over needs."""
DIGEST_CHARS = 8000
"""Of a seed told without the model's help."""
SEED_HEADER = "Notes on an earlier conversation that this session continues:\n"


async def compact(run: "Run", upto: int) -> None:
    """Summarise the view's entries up to record `upto`."""
    context = run.context
    turn = context.turn.fact.turn if context.turn else 0
    messages = chat(context.before(upto))
    if context.summary is not None:
        messages.insert(0, {"role": "user", "content": f"Earlier summary:\n{context.summary}"})
    call = _Call(run, "compaction", turn)
    try:
        summary = await call.text("compaction", messages)
    except ModelFault as fault:
        failed = CompactionFailed(turn=turn, code=fault.code, detail=fault.detail)
        await run.commit(call.fact(fault.code), failed)
    else:
        await run.commit(call.fact(), Compacted(turn=turn, upto=upto, summary=summary))


async def seed(run: "Run", request: SeedRequested) -> None:
    """Tell the session about earlier messages as one user message."""
    call = _Call(run, "seed", request.turn)
    fallback = False
    try:
        summary = await call.text("seed", request.messages)
    except ModelFault as fault:
        fact, fallback = call.fact(fault.code), True
        summary = render(request.messages, max_chars=DIGEST_CHARS)
    else:
        fact = call.fact()
    seeded = Seeded(
        turn=request.turn,
        summary=SEED_HEADER + summary,
        n_messages=len(request.messages),
        n_dropped=request.n_dropped,
        fallback=fallback,
    )
    await run.commit(fact, seeded)


class _Call:
    """One summarising model call and the fact about it."""

    def __init__(self, run: "Run", kind: Literal["compaction", "seed"], turn: int) -> None:
        self._run, self._turn = run, turn
        self._kind: Literal["compaction", "seed"] = kind
        self._began_s = run.now_s()
        self._completion: Completion | None = None

    async def text(self, prompt_name: str, messages: Sequence[dict[str, Any]]) -> str:
        """
        Raises:
            ModelFault: the call failed, or its answer is empty.
        """
        context = self._run.context
        max_chars = (context.window_tokens // 2) * CHARS_PER_TOKEN
        request = ModelRequest(
            model=context.model,
            messages=[
                {"role": "system", "content": prompt(prompt_name)},
                {"role": "user", "content": render(messages, max_chars=max_chars)},
            ],
            session_id=context.opened.session_id,
            kind=self._kind,
            max_output_tokens=SUMMARY_TOKENS,
        )
        try:
            with boundary(ModelFault, "The model call failed."):
                async with aclosing(self._run.model.stream(request)) as stream:
                    async for chunk in stream:
                        if isinstance(chunk, Completion):
                            self._completion = chunk
        except asyncio.CancelledError:
            await self._run.commit(self.fact("interrupted"))
            raise
        if self._completion is None or not self._completion.text.strip():
            raise ModelFault("The model returned no summary.")
        return self._completion.text

    def fact(self, fault: str | None = None) -> ModelCalled:
        done = self._completion
        return ModelCalled(
            turn=self._turn,
            model=self._run.context.model,
            kind=self._kind,
            usage=done.usage if done else None,
            cost_usd=done.cost_usd if done else None,
            latency_ms=round((self._run.now_s() - self._began_s) * 1000),
            n_retries=done.n_retries if done else 0,
            fault=fault,
        )
