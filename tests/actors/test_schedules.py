"""Random commands, answers and crashes, seeded: whatever happens, the journal tells one sound story."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from actors.activation import Activation
from actors.protocol import (
    AnyCommand,
    Compact,
    Conflict,
    Decide,
    Interrupt,
    Invalid,
    Seed,
    SendMessage,
    Truncate,
    Undo,
)
from agent.context import Context
from agent.events import TURN_OPENERS, AssistantMessage, Decision, ToolFinished, TurnEnded
from agent.faults import ContextOverflow, ModelUnavailable
from agent.model.contract import ModelCard, ModelRequest
from agent.spec import Compaction
from agent.testing import Reply
from agent.testing.model import play
from tests.actors.conftest import MakeStand
from tests.support.house import ALICE
from tests.support.stand import ASKING, Stand, call

SPEC = ASKING.model_copy(update={"compaction": Compaction(at_fraction=0.4, keep_fraction=0.1)})


class RandomModel:
    """Answers with texts, calls and faults, drawn from a seed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def stream(self, request: ModelRequest) -> AsyncGenerator[Any]:
        return play(self._reply(request), request)

    def _reply(self, request: ModelRequest) -> Reply:
        rng = self._rng
        if rng.random() < 0.1:
            return Reply(
                "cut", fault=rng.choice([ModelUnavailable("away"), ContextOverflow("long")])
            )
        if request.kind != "main" or rng.random() < 0.4:
            return Reply("said " * rng.randrange(1, 40), chunks=3)
        tools = [
            rng.choice(["echo", "effect", "burst", "nobody"]) for _ in range(rng.randrange(1, 4))
        ]
        calls = tuple(call(tool, "w" * rng.randrange(1, 300)) for tool in tools)
        return Reply("let me", chunks=2, tool_calls=calls)

    async def card(self, model: str) -> ModelCard:
        del model
        return ModelCard(window_tokens=2000, priced=True)


def command(rng: random.Random, activation: Activation) -> AnyCommand:
    pending = list(activation.context.pending)
    decisions = tuple(
        Decision(
            tool_call_id=call_id,
            decision=kind,
            arguments='{"word": "mine"}' if kind == "edit" else None,
        )
        for call_id in rng.sample(pending, rng.randrange(len(pending) + 1))
        for kind in [rng.choice(["approve", "reject", "edit"])]
    )
    if decisions and rng.random() < 0.8:
        return Decide(decisions=decisions)
    return rng.choice(
        [
            SendMessage(text="please " * rng.randrange(1, 30)),
            SendMessage(text="and"),
            Interrupt(),
            Undo(),
            Truncate(user_message_index=rng.randrange(3)),
            Compact(),
            Seed(messages=({"role": "user", "content": "before"}, 3)),
        ]
    )


@pytest.mark.parametrize("seed", range(40))
async def test_any_schedule_leaves_a_sound_session(stand: MakeStand, seed: int) -> None:
    rng = random.Random(seed)
    made = stand(model=RandomModel(rng))
    activation = await made.open(SPEC)
    for _ in range(40):
        if rng.random() < 0.1:
            await activation.end()  # as a crash leaves it: no last fact
            activation = await made.wake()
        with contextlib.suppress(Conflict, Invalid):
            await activation.submit(ALICE, command(rng, activation))
        for _ in range(rng.randrange(30)):
            await asyncio.sleep(0)
    await made.rested(activation)
    await check(made, activation)


async def check(made: Stand, activation: Activation) -> None:
    records = await made.records()
    facts = [record.fact for record in records]
    assert [record.seq for record in records] == list(range(1, len(records) + 1))

    opened = [fact.turn for fact in facts if isinstance(fact, TURN_OPENERS)]
    ended = [fact.turn for fact in facts if isinstance(fact, TurnEnded)]
    assert opened == ended == list(range(1, len(opened) + 1))

    proposed = [
        c.tool_call_id for f in facts if isinstance(f, AssistantMessage) for c in f.tool_calls
    ]
    settled = Counter(f.tool_call_id for f in facts if isinstance(f, ToolFinished))
    assert len(set(proposed)) == len(proposed)
    assert set(settled.values()) <= {1}
    assert set(settled) <= set(proposed)

    context = activation.context
    in_view = {c["id"] for m in context.messages() for c in m.get("tool_calls", [])}
    assert in_view - set(settled) == set(context.pending)

    row = await made.kit.journal.row("s")
    assert {ask.tool_call_id for ask in row.pending} == set(context.pending)
    assert row.n_open_turns == 0
    assert row.n_messages == context.n_messages_upto(context.n_turns)

    fresh = Context(made.kit.tools(SPEC).idempotent, context.window_tokens)
    fresh.fold(records)
    assert fresh.prompt() == context.prompt()
    assert_well_formed(context.prompt())


def assert_well_formed(prompt: list[dict[str, Any]]) -> None:
    """Every call has its result right after its message, and no result is without a call."""
    waiting: list[str] = []
    for message in prompt:
        if message["role"] == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
            continue
        assert waiting == []
        waiting = [c["id"] for c in message.get("tool_calls", [])]
    assert waiting == []
