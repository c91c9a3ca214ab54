"""What holds for every Model: `agent.model.contract`."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import NamedTuple

import pytest

from agent.faults import ModelCut, ModelFault, ModelUnavailable
from agent.model.contract import Completion, Model, ModelRequest, ReasoningChunk, TextChunk
from agent.model.direct import DirectModel
from agent.model.litellm_adapter import LitellmModel, load_litellm
from agent.model.retry import RetryingModel
from agent.settings import ModelSettings
from agent.testing import Reply, ScriptedModel
from tests.support.gateways import gateway
from tests.support.openai_server import (
    Event,
    Mark,
    OpenAIServer,
    Refuse,
    Stream,
    Whole,
    call,
    chunk,
    ends,
    says,
    words,
)

REQUEST = ModelRequest("openai/test", [{"role": "user", "content": "hi"}])
WAIT_S = 5
# litellm reads a field of pydantic's in a way that is deprecated, for every usage chunk.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields'")


class Play(NamedTuple):
    """One thing a model can do, told to each kind of model in its own way."""

    reply: Reply
    behaviour: Stream | Refuse | Whole


def calls(*tools: str) -> list[Event]:
    return [call(n, call_id="same", name=tool, arguments="{}") for n, tool in enumerate(tools)]


SAYS = Play(Reply("hello", chunks=5), Stream(says(*"hello")))
WHOLE = Play(Reply("hello"), Whole({"content": "hello"}))
CALLS = Play(
    Reply("ok", tool_calls=(("bash", {}), ("read", {}))),
    Stream([*words("ok"), *calls("bash", "read"), *ends("tool_calls")]),
)
THINKS = Play(
    Reply("so", reasoning="hm"),
    Stream([chunk({"reasoning_content": "hm"}), *words("so"), *ends()]),
)
BREAKS = Play(
    Reply("hel", fault=ModelCut("cut")),
    Stream([*words("hel"), Mark.EOF]),
)
FAILS = Play(Reply(fault=ModelUnavailable("gone")), Refuse(503))
STALLS = Play(Reply("hel", hang=True), Stream([*words("hel"), Mark.STALL]))

Make = Callable[[Play], Model]


@pytest.fixture(params=["scripted", "retrying", "gateway", "litellm", "direct"])
async def make(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Make]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    if request.param == "litellm":
        load_litellm()  # takes longer than a wait may
    with OpenAIServer() as server:
        settings = ModelSettings(api_base=server.url, max_retries=0)
        direct = DirectModel(settings)
        stack = AsyncExitStack()
        through_gateway = await gateway_before(direct, stack)

        def make(play: Play) -> Model:
            server.script(play.behaviour)
            scripted = ScriptedModel([play.reply])
            match request.param:
                case "scripted":
                    return scripted
                case "retrying":
                    return RetryingModel(scripted, settings)
                case "gateway":
                    return through_gateway
                case "direct":
                    return direct
                case _:
                    return LitellmModel(settings)

        yield make
        await stack.aclose()
        await direct.close()


async def gateway_before(model: Model, stack: AsyncExitStack) -> Model:
    """As a session has it: over the network."""
    between = await stack.enter_async_context(gateway())
    await between.replica(model)
    return between.session()


async def collected(model: Model) -> list[TextChunk | ReasoningChunk | Completion]:
    async with aclosing(model.stream(REQUEST)) as stream:
        return [item async for item in stream]


async def test_a_stream_ends_with_one_completion_that_holds_its_chunks(make: Make) -> None:
    *chunks, last = await collected(make(SAYS))
    assert isinstance(last, Completion)
    assert all(isinstance(item, TextChunk) and item.text for item in chunks)
    assert "".join(item.text for item in chunks if isinstance(item, TextChunk)) == "hello"
    assert (last.text, last.finish_reason, last.tool_calls) == ("hello", "stop", ())
    assert last.usage
    assert last.usage.completion_tokens > 0


async def test_calls_have_ids_that_are_unique_and_arguments_in_json(make: Make) -> None:
    last = (await collected(make(CALLS)))[-1]
    assert isinstance(last, Completion)
    assert [(c.tool, json.loads(c.arguments)) for c in last.tool_calls] == [
        ("bash", {}),
        ("read", {}),
    ]
    assert len({c.tool_call_id for c in last.tool_calls} - {""}) == 2
    assert last.finish_reason == "tool_calls"


async def test_unwatched_an_answer_comes_in_one_piece(make: Make) -> None:
    async with aclosing(make(WHOLE).stream(REQUEST._replace(stream=False))) as stream:
        *chunks, last = [item async for item in stream]
    assert chunks == [TextChunk("hello")]
    assert isinstance(last, Completion)
    assert (last.text, last.finish_reason) == ("hello", "stop")
    assert last.usage


async def test_reasoning_is_no_text(make: Make) -> None:
    items = await collected(make(THINKS))
    assert items[:2] == [ReasoningChunk("hm"), TextChunk("so")]
    assert isinstance(items[-1], Completion)
    assert (items[-1].text, items[-1].reasoning) == ("so", "hm")


@pytest.mark.parametrize(("play", "kind"), [(BREAKS, ModelCut), (FAILS, ModelUnavailable)])
async def test_a_failed_stream_raises_its_fault_and_completes_nothing(
    make: Make, play: Play, kind: type[ModelFault]
) -> None:
    seen: list[object] = []
    with pytest.raises(kind):
        await _into(seen, make(play))
    assert not any(isinstance(item, Completion) for item in seen)


async def _into(seen: list[object], model: Model) -> None:
    async with aclosing(model.stream(REQUEST)) as stream:
        async for item in stream:
            seen.append(item)  # noqa: PERF401  what came before a fault is kept


async def test_closing_early_ends_the_call(make: Make) -> None:
    async with asyncio.timeout(WAIT_S):
        stream = make(STALLS).stream(REQUEST)
        assert await anext(stream) == TextChunk("hel")
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_cancelling_ends_the_call(make: Make) -> None:
    shown = asyncio.Event()

    async def read(model: Model) -> None:
        async with aclosing(model.stream(REQUEST)) as stream:
            async for _ in stream:
                shown.set()

    async with asyncio.timeout(WAIT_S):
        reading = asyncio.ensure_future(read(make(STALLS)))
        await shown.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_every_model_has_a_card(make: Make) -> None:
    assert (await make(SAYS).card("openai/test")).window_tokens == 128_000
