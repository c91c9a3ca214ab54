"""The model gateway on the data plane: real sockets on loopback, no Ray."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from actors import gateway_wire as wire
from actors.gateway_client import GatewayModel
from actors.gateway_plane import BUFFER_ITEMS, ModelGateway, joined
from actors.gateway_wire import Place
from actors.gateways import FORGET_S, Gateways
from actors.pace import Pace
from actors.plane import MAX_FRAME_BYTES, PlaneAddress
from actors.wire import packed, unpacked
from agent.events import ToolCall, Usage
from agent.faults import ModelAuth, ModelFault, ModelLost, ModelRefused
from agent.model.contract import Completion, ModelCard, ModelRequest, ReasoningChunk, TextChunk
from agent.testing import NamedScripts, Reply, ScriptedModel
from tests.support.gateways import Gateway, gateway

WAIT_S = 5.0
ADDRESS = PlaneAddress("127.0.0.1", 1, "token")
END = Completion("abc", (), "stop", None, None)


def puppet(script: str) -> ModelRequest:
    return ModelRequest("scripted/puppet", [{"role": "user", "content": script}])


@pytest.fixture
async def house() -> AsyncIterator[Gateway]:
    async with gateway() as house, asyncio.timeout(3 * WAIT_S):
        yield house


async def asked(model: Any, request: ModelRequest) -> list[Any]:
    async with aclosing(model.stream(request)) as stream:
        return [item async for item in stream]


# -- what crosses the network ----------------------------------------------------------------


def test_a_request_arrives_as_it_was_sent() -> None:
    request = ModelRequest(
        "openai/m",
        [{"role": "user", "content": "half a pair: \ud800"}],
        tools=[{"type": "function", "function": {"name": "bash", "parameters": {"n": None}}}],
        session_id="s",
        kind="compaction",
        max_output_tokens=7,
        temperature=0.5,
        stream=False,
    )
    assert wire.request_of(sent(request._asdict())) == request


def sent(value: Any) -> Any:
    return unpacked(packed(value))


def test_items_arrive_as_they_were_sent() -> None:
    call = ToolCall(tool_call_id="c", tool="bash", arguments="{broken")
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, reasoning_tokens=1)
    end = Completion("ab", (call,), "tool_calls", usage, 0.25, reasoning="hm", n_retries=2)
    items = (ReasoningChunk("hm"), TextChunk("ab\udfff"), end)
    assert wire.batch_of(sent(wire.told_batch(items))) == items
    assert wire.batch_of(sent(wire.told_batch([END]))) == (END,)
    assert wire.batch_of(sent(wire.told_batch([]))) == ()
    card = ModelCard(window_tokens=9, priced=False)
    assert wire.card_of(sent(card)) == card


def test_what_a_newer_replica_says_more_is_left_out() -> None:
    usage = {"prompt_tokens": 1, "audio_tokens": 9}
    calls = [{"tool_call_id": "c", "tool": "t", "arguments": "{}", "sort": 1}]
    completion = END._asdict() | {"usage": usage, "tool_calls": calls, "colour": "blue"}
    told = [["text", "abc", 1], ["picture", b"..."], ["completion", completion]]
    text, end = wire.batch_of(sent(told))
    assert text == TextChunk("abc")
    assert isinstance(end, Completion)
    assert end.usage == Usage(prompt_tokens=1)
    assert end.tool_calls == (ToolCall(tool_call_id="c", tool="t", arguments="{}"),)
    assert wire.card_of([5, True, "more"]) == ModelCard(5, priced=True)
    place = Place("r", "app", ADDRESS, "n", 1, 0)
    assert wire.place_of(place._asdict() | {"zone": "x"}) == place


# -- batches ---------------------------------------------------------------------------------


def test_neighbours_of_one_kind_are_joined() -> None:
    items = [ReasoningChunk("x"), TextChunk("a"), TextChunk("b"), ReasoningChunk("y"), END]
    assert joined(items) == (ReasoningChunk("x"), TextChunk("ab"), ReasoningChunk("y"), END)
    assert joined([]) == ()


class Burst(NamedScripts):
    """Never waits: a provider whose chunks came in one packet."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n
        self.n_sent = 0

    async def stream(self, request: ModelRequest) -> AsyncGenerator[TextChunk]:  # type: ignore[override]
        while self.n_sent < self._n:
            self.n_sent += 1
            yield TextChunk("x")


async def test_what_is_ready_together_travels_together() -> None:
    async with aclosing(ModelGateway(Burst(100)).chunks(puppet(""))) as stream:
        assert [batch async for batch in stream] == [(), (TextChunk("x" * 100),)]


async def test_a_slow_session_holds_the_provider_back() -> None:
    burst = Burst(10_000)
    async with aclosing(ModelGateway(burst).chunks(puppet(""))) as stream:
        await anext(stream)
        await anext(stream)
        assert burst.n_sent <= 2 * BUFFER_ITEMS


async def test_a_silent_call_shows_that_it_lives() -> None:
    model = ModelGateway(NamedScripts(), heartbeat_s=0.01)
    async with aclosing(model.chunks(puppet("- {hang: true}"))) as stream:
        assert [await anext(stream) for _ in range(3)] == [(), (), ()]


class Fed:
    """Yields what a test feeds it."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[TextChunk | Completion] = asyncio.Queue()

    async def stream(self, request: ModelRequest) -> AsyncGenerator[TextChunk | Completion]:
        while True:
            item = await self.items.get()
            yield item
            if isinstance(item, Completion):
                return


async def test_a_first_token_waits_for_nothing_and_the_end_neither() -> None:
    """Under a pace and a clock that let no second send pass."""
    fed = Fed()
    pace = Pace(3600.0, lambda: 0.0)
    pace.sent("another")
    model = ModelGateway(fed, pace=pace)  # type: ignore[arg-type]
    async with asyncio.timeout(WAIT_S), aclosing(model.chunks(puppet(""))) as stream:
        assert await anext(stream) == ()
        await fed.items.put(TextChunk("a"))
        assert await anext(stream) == (TextChunk("a"),)
        await fed.items.put(TextChunk("b"))
        await fed.items.put(END)
        assert await anext(stream) == (TextChunk("b"), END)


async def test_a_stream_that_flows_gathers_while_it_waits_for_its_turn() -> None:
    """The pace's clock stands, so its wait of 0.1 s is the only way on."""
    fed = Fed()
    model = ModelGateway(fed, pace=Pace(1.0, lambda: 0.0))  # type: ignore[arg-type]
    async with asyncio.timeout(WAIT_S), aclosing(model.chunks(puppet(""))) as stream:
        assert await anext(stream) == ()
        await fed.items.put(TextChunk("a"))
        assert await anext(stream) == (TextChunk("a"),)
        second = asyncio.ensure_future(anext(stream))
        for text in "bcd":
            await fed.items.put(TextChunk(text))
            await asyncio.sleep(0)
        assert await second == (TextChunk("bcd"),)


async def test_a_fault_comes_after_all_that_was_said_and_without_its_cause() -> None:
    fault = ModelAuth("no")
    fault.__cause__ = ValueError("the provider's words")
    model = ModelGateway(ScriptedModel([Reply("abc", chunks=3, fault=fault)]))
    async with aclosing(model.chunks(puppet(""))) as stream:
        seen = ""
        while len(seen) < 3:
            seen += "".join(item.text for item in await anext(stream))
        with pytest.raises(ModelAuth) as caught:
            _ = [batch async for batch in stream]
    assert seen == "abc"
    assert caught.value.__cause__ is None


# -- over the network ------------------------------------------------------------------------


class Watched(NamedScripts):
    """Tells when a request ended, however it did."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Any]:  # type: ignore[override]
        try:
            async with aclosing(super().stream(request)) as stream:
                async for item in stream:
                    yield item
        finally:
            self.ended.set()


async def test_closing_early_ends_the_providers_request(house: Gateway) -> None:
    model = Watched()
    await house.replica(model)
    async with aclosing(house.session().stream(puppet("- {say: a, hang: true}"))) as stream:
        assert await anext(stream) == TextChunk("a")
        assert not model.ended.is_set()
    await asyncio.wait_for(model.ended.wait(), WAIT_S)


async def test_a_replica_that_goes_in_the_middle_is_a_lost_call(house: Gateway) -> None:
    await house.replica(NamedScripts())
    async with aclosing(house.session().stream(puppet("- {say: a, hang: true}"))) as stream:
        assert await anext(stream) == TextChunk("a")
        await house.plane.close()
        with pytest.raises(ModelLost):
            await anext(stream)


async def test_a_replica_that_falls_silent_is_a_lost_call(house: Gateway) -> None:
    await house.replica(NamedScripts(), heartbeat_s=3600.0)
    model = house.session(silence_s=0.2)
    async with aclosing(model.stream(puppet("- {say: a, hang: true}"))) as stream:
        assert await anext(stream) == TextChunk("a")
        with pytest.raises(ModelLost):
            await anext(stream)


async def test_a_heartbeat_keeps_a_silent_call(house: Gateway) -> None:
    """It lasts three times as long as silence may."""
    await house.replica(NamedScripts(), heartbeat_s=0.05)
    items = await asked(
        house.session(silence_s=0.5), puppet("- {say: abc, chunks: 3, delay_s: 0.5}")
    )
    assert items[-1].text == "abc"


async def test_another_replica_takes_the_call_that_one_does_not(house: Gateway) -> None:
    await house.replica(NamedScripts(), node_id="here")
    await house.plane.close()
    await house.replica(NamedScripts(), node_id="there")
    items = await asked(house.session(node_id="here"), puppet("- {say: b}"))
    assert items[-1].text == "b"


async def test_a_replica_of_the_own_node_comes_first(house: Gateway) -> None:
    far, near = ScriptedModel([]), ScriptedModel([Reply("x")] * 8)
    await house.replica(far, node_id="far")
    await house.replica(near, node_id="near")
    model = house.session(node_id="near")
    for _ in range(8):
        await asked(model, puppet(""))
    assert (len(far.requests), len(near.requests)) == (0, 8)


async def test_a_replica_that_comes_later_is_found(house: Gateway) -> None:
    model = house.session()
    asking = asyncio.create_task(asked(model, puppet("- {say: late}")))
    await asyncio.sleep(0)
    await house.replica(NamedScripts())
    assert (await asking)[-1].text == "late"


async def test_without_a_replica_a_call_is_lost(house: Gateway) -> None:
    with pytest.raises(ModelLost):
        await asked(house.session(silence_s=0.05), puppet("- {say: a}"))


async def test_a_lost_replica_is_asked_again_once_it_tells_that_it_lives(house: Gateway) -> None:
    place = await house.replica(NamedScripts(), heartbeat_s=3600.0)
    model = house.session(silence_s=0.2)
    with pytest.raises(ModelLost):
        await asked(model, puppet("- {say: a, hang: true}"))
    with pytest.raises(ModelLost):
        await asked(model, puppet("- {say: b}"))
    house.gateways.here(place._replace(beat=2))
    assert (await asked(model, puppet("- {say: b}")))[-1].text == "b"


async def test_one_lost_call_leaves_the_others_of_its_process_alone(house: Gateway) -> None:
    await house.replica(NamedScripts(), heartbeat_s=3600.0)
    model = house.session(silence_s=1.0)
    long = asyncio.create_task(asked(model, puppet("- {say: abcdefgh, chunks: 8, delay_s: 0.25}")))
    with pytest.raises(ModelLost):
        await asked(model, puppet("- {say: a, hang: true}"))
    assert (await long)[-1].text == "abcdefgh"


async def test_a_replica_of_other_versions_of_the_wire_is_not_asked(house: Gateway) -> None:
    place = await house.replica(NamedScripts())
    house.gateways.here(place._replace(beat=2, versions=(wire.VERSION + 1,)))
    with pytest.raises(ModelLost):
        await asked(house.session(silence_s=0.05), puppet("- {say: a}"))


@pytest.mark.parametrize("kind", [ModelFault, *ModelFault.__subclasses__()])
async def test_every_fault_of_a_model_arrives_as_itself(
    house: Gateway, kind: type[ModelFault]
) -> None:
    fault = kind("a sentence", retry_after_s=1.5, missing=["KEY"])
    await house.replica(ScriptedModel([Reply("a", fault=fault)]))
    with pytest.raises(ModelFault) as caught:
        await asked(house.session(), puppet(""))
    assert type(caught.value) is kind
    assert caught.value.detail == "a sentence"
    assert caught.value.fields == {"retry_after_s": 1.5, "missing": ["KEY"]}


async def test_a_request_beyond_the_limit_is_refused_before_it_leaves(house: Gateway) -> None:
    await house.replica(NamedScripts())
    with pytest.raises(ModelRefused):
        await asked(house.session(), puppet("x" * MAX_FRAME_BYTES))


async def test_a_card_is_asked_for_once(house: Gateway) -> None:
    class Counting(NamedScripts):
        n = 0

        async def card(self, model: str) -> ModelCard:
            self.n += 1
            return await super().card(model)

    counting = Counting()
    await house.replica(counting)
    model = house.session()
    cards = [await model.card("scripted/demo") for _ in range(3)]
    assert {card.window_tokens for card in cards} == {128_000}
    assert counting.n == 1


async def test_many_streams_share_a_replica(house: Gateway) -> None:
    await house.replica(NamedScripts())
    sessions = [house.session() for _ in range(20)]
    request = puppet("- {say: abcdefghij, chunks: 10, delay_s: 0.01}")
    answers = await asyncio.gather(*(asked(session, request) for session in sessions))
    for *chunks, end in answers:
        assert "".join(chunk.text for chunk in chunks) == end.text == "abcdefghij"


async def test_who_knows_the_replicas_may_be_away_for_a_while(house: Gateway) -> None:
    await house.replica(NamedScripts())
    n_asked = 0

    async def ask(failed: Any, wait_s: float) -> list[Place]:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 1:
            raise ModelFault("away")  # any Fault
        return await house.gateways.some("gateway", failed, wait_s)

    assert (await asked(GatewayModel(ask, WAIT_S), puppet("- {say: a}")))[-1].text == "a"


# -- who knows the replicas ------------------------------------------------------------------


def place(name: str, beat: int = 1) -> Place:
    return Place(name, "app", ADDRESS, "n", beat, 0)


def test_a_replica_that_tells_no_more_is_forgotten() -> None:
    now_s = 0.0
    known = Gateways(lambda: now_s)
    known.here(place("a"))
    now_s = FORGET_S - 1
    known.here(place("b"))
    assert [p.replica_id for p in known.of("app")] == ["a", "b"]
    now_s = FORGET_S + 1
    assert [p.replica_id for p in known.of("app")] == ["b"]
    known.gone("b")
    assert known.of("app") == known.of("another") == []


async def test_who_waits_hears_of_a_replica_that_did_not_fail() -> None:
    known = Gateways(lambda: 0.0)
    known.here(place("a", beat=3))
    assert await known.some("app", {"a": 2}, WAIT_S) == [place("a", beat=3)]
    assert await known.some("app", {"a": 3}, 0.01) == [place("a", beat=3)]
    waiting = asyncio.create_task(known.some("app", {"a": 3}, WAIT_S))
    await asyncio.sleep(0)
    known.here(place("a", beat=4))
    assert await waiting == [place("a", beat=4)]
