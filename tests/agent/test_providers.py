"""Both adapters against a real HTTP server: what one does, the other does too."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from agent.faults import (
    ContextOverflow,
    ModelAuth,
    ModelCut,
    ModelFault,
    ModelRateLimited,
    ModelRefused,
    ModelTimeout,
    ModelUnavailable,
)
from agent.model.contract import Completion, Model, ModelRequest, ReasoningChunk, TextChunk
from agent.model.direct import DirectModel
from agent.model.litellm_adapter import LitellmModel, load_litellm
from agent.settings import ModelSettings, Price
from tests.support.openai_server import (
    Event,
    Mark,
    OpenAIServer,
    Refuse,
    Silence,
    Stream,
    Whole,
    call,
    chunk,
    ends,
    says,
    usage,
    words,
)

REQUEST = ModelRequest("openai/test", [{"role": "user", "content": "hi"}])
SECRET = "sk-secret-7319"
TOOL = {
    "type": "function",
    "function": {"name": "bash", "description": "", "parameters": {"type": "object"}},
}
WAIT_S = 5
# litellm reads a field of pydantic's in a way that is deprecated, for every usage chunk.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields'")


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    load_litellm()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with OpenAIServer() as server:
        yield server


Make = Callable[..., Model]


@pytest.fixture(params=["litellm", "direct"])
async def model(request: pytest.FixtureRequest, server: OpenAIServer) -> AsyncIterator[Make]:
    """Makes a model for the server, with the settings given."""
    made: list[DirectModel] = []

    def make(**settings: Any) -> Model:
        read = ModelSettings(**{"api_base": server.url} | settings)
        if request.param == "litellm":
            return LitellmModel(read)
        made.append(DirectModel(read))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def answer(adapter: Model, request: ModelRequest = REQUEST) -> Completion:
    async with aclosing(adapter.stream(request)) as stream:
        last = [item async for item in stream][-1]
    assert isinstance(last, Completion)
    return last


async def fault(adapter: Model) -> ModelFault:
    with pytest.raises(ModelFault) as caught:
        await answer(adapter)
    return caught.value


async def test_the_request_carries_what_was_asked(server: OpenAIServer, model: Make) -> None:
    request = REQUEST._replace(tools=[TOOL], temperature=0.5, max_output_tokens=9)
    await answer(model(), request)
    [received] = server.requests
    body = received.body
    assert body["messages"] == REQUEST.messages
    assert (body["model"], body["tools"], body["temperature"]) == ("test", [TOOL], 0.5)
    assert body.get("max_tokens", body.get("max_completion_tokens")) == 9
    assert received.headers["authorization"] == f"Bearer {SECRET}"


async def test_optional_fields_stay_out_of_the_request(server: OpenAIServer, model: Make) -> None:
    await answer(model())
    assert not {"tools", "temperature", "max_tokens"} & server.requests[0].body.keys()


async def test_parallel_calls_are_put_together_from_their_pieces(
    server: OpenAIServer, model: Make
) -> None:
    pieces = [
        call(0, call_id="a", name="bash", arguments='{"com'),
        call(1, call_id="b", name="read"),
        call(0, arguments='mand": '),
        call(1, arguments='{"path": "x"}'),
        call(0, arguments='"ls"}'),
    ]
    server.script(Stream([*pieces, *ends("tool_calls")]))
    said = await answer(model())
    assert [(c.tool_call_id, c.tool, c.arguments) for c in said.tool_calls] == [
        ("a", "bash", '{"command": "ls"}'),
        ("b", "read", '{"path": "x"}'),
    ]


@pytest.mark.parametrize("ids", [(None, None), ("", ""), ("same", "same"), ("old", "new")])
async def test_ids_of_calls_are_repaired(
    server: OpenAIServer, ids: tuple[str | None, ...], model: Make
) -> None:
    pieces = [call(n, call_id=call_id, name="bash") for n, call_id in enumerate(ids)]
    server.script(Stream([*pieces, *ends("tool_calls")]))
    old = {"id": "old", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    messages = [
        *REQUEST.messages,
        {"role": "assistant", "content": "", "tool_calls": [old]},
        {"role": "tool", "tool_call_id": "old", "content": "x"},
    ]
    said = await answer(model(), REQUEST._replace(messages=messages))
    assert len({c.tool_call_id for c in said.tool_calls} - {"", "old"}) == 2


async def test_calls_that_all_have_the_index_0_stay_apart(
    server: OpenAIServer, model: Make
) -> None:
    pieces = [call(0, call_id=f"c{n}", name="bash", arguments=f'{{"n": {n}}}') for n in range(3)]
    server.script(Stream([*pieces, *ends("tool_calls")]))
    said = await answer(model())
    assert [c.arguments for c in said.tool_calls] == ['{"n": 0}', '{"n": 1}', '{"n": 2}']


async def test_unwatched_an_answer_holds_all_that_a_stream_would(
    server: OpenAIServer, model: Make
) -> None:
    function = {"name": "bash", "arguments": '{"n": 1}'}
    calls = [{"id": "same", "type": "function", "function": function}] * 2
    message = {"content": "so", "reasoning_content": "hm", "tool_calls": calls}
    server.script(Whole(message, "tool_calls"))
    async with aclosing(model().stream(REQUEST._replace(stream=False))) as stream:
        *chunks, said = [item async for item in stream]
    assert not server.requests[0].body.get("stream")
    assert chunks == [ReasoningChunk("hm"), TextChunk("so")]
    assert isinstance(said, Completion)
    assert (said.text, said.reasoning, said.finish_reason) == ("so", "hm", "tool_calls")
    assert [c.arguments for c in said.tool_calls] == ['{"n": 1}'] * 2
    assert len({c.tool_call_id for c in said.tool_calls}) == 2
    assert said.usage
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (7, 5)


async def test_unwatched_no_usage_means_no_usage(server: OpenAIServer, model: Make) -> None:
    server.script(Whole({"content": "so"}, usage=None))
    said = await answer(model(), REQUEST._replace(stream=False, model="openai/gpt-4o"))
    assert (said.text, said.usage, said.cost_usd) == ("so", None, None)


@pytest.mark.parametrize(
    ("code", "before", "kind"),
    [
        (400, [], ModelRefused),
        (401, [], ModelAuth),
        (429, [], ModelRateLimited),
        (500, [], ModelUnavailable),
        (500, words("a"), ModelCut),
        (429, words("a"), ModelRateLimited),
    ],
)
async def test_an_error_inside_a_stream_becomes_its_fault(
    server: OpenAIServer,
    model: Make,
    code: int,
    before: list[Event],
    kind: type[ModelFault],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Through `openai/` litellm loses the code.
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", SECRET)
    error: Event = {"error": {"message": f"bad {SECRET}", "type": "x", "code": code}}
    server.script(Stream([*before, error, Mark.DONE]))
    with pytest.raises(ModelFault) as caught:
        await answer(model(), REQUEST._replace(model="hosted_vllm/test"))
    assert type(caught.value) is kind
    assert SECRET not in f"{caught.value} {caught.value.fields}"


async def test_usage_counts_cached_and_reasoning_tokens(server: OpenAIServer, model: Make) -> None:
    counted = usage(100, 20, cached=60, reasoning=8)
    server.script(Stream([*words("a"), chunk(finish_reason="stop"), counted, Mark.DONE]))
    said = await answer(model())
    assert said.usage
    assert said.usage.model_dump() == {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "cached_tokens": 60,
        "reasoning_tokens": 8,
    }


async def test_a_model_without_a_price_costs_none_not_zero(model: Make) -> None:
    assert (await answer(model())).cost_usd is None
    assert not (await model().card("openai/test")).priced


async def test_litellm_prices_the_models_it_knows(model: Make) -> None:
    said = await answer(model(), REQUEST._replace(model="openai/gpt-4o"))
    assert said.cost_usd
    assert 0 < said.cost_usd < 0.01
    card = await model().card("openai/gpt-4o")
    assert (card.window_tokens, card.priced) == (128_000, True)


async def test_the_operators_price_counts_cached_tokens_apart(
    server: OpenAIServer, model: Make
) -> None:
    price = Price(input_usd_per_mtok=10, output_usd_per_mtok=20, cached_usd_per_mtok=1)
    counted = usage(1000, 100, cached=400)
    server.script(Stream([*words("a"), chunk(finish_reason="stop"), counted, Mark.DONE]))
    adapter = model(prices={"openai/test": price})
    assert (await answer(adapter)).cost_usd == pytest.approx((6000 + 400 + 2000) / 1e6)
    assert (await adapter.card("openai/test")).priced


async def test_no_usage_means_no_usage_and_no_cost(server: OpenAIServer, model: Make) -> None:
    server.script(Stream([*words("a"), chunk(finish_reason="stop"), Mark.DONE]))
    said = await answer(model(), REQUEST._replace(model="openai/gpt-4o"))
    assert (said.text, said.usage, said.cost_usd) == ("a", None, None)


async def test_an_answer_that_hit_its_limit_says_so(server: OpenAIServer, model: Make) -> None:
    server.script(Stream([*words("a"), *ends("length")]))
    assert (await answer(model())).finish_reason == "length"


async def test_a_chunk_may_repeat_for_ever(server: OpenAIServer, model: Make) -> None:
    server.script(Stream(says(*["-----"] * 300)))
    assert (await answer(model())).text == "-----" * 300


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Refuse(400), ModelRefused),
        (Refuse(401), ModelAuth),
        (Refuse(402), ModelRefused),
        (Refuse(403), ModelAuth),
        (Refuse(404), ModelRefused),
        (Refuse(422), ModelRefused),
        (Refuse(429), ModelRateLimited),
        (Refuse(500), ModelUnavailable),
        (Refuse(502), ModelUnavailable),
        (Refuse(503), ModelUnavailable),
        (Refuse(400, {"message": "too much", "code": "context_length_exceeded"}), ContextOverflow),
        (
            Refuse(400, {"message": "This model's maximum context length is 10 tokens."}),
            ContextOverflow,
        ),
    ],
)
async def test_a_refusal_becomes_its_fault_without_the_providers_words(
    server: OpenAIServer, refusal: Refuse, kind: type[ModelFault], model: Make
) -> None:
    leak = refusal.error | {"message": f"{refusal.error['message']} key {SECRET}"}
    server.script(refusal._replace(error=leak))
    found = await fault(model())
    assert type(found) is kind
    assert SECRET not in f"{found} {found.fields}"
    assert refusal.error["message"] not in str(found)
    assert len(server.requests) == 1


def in_a_while() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("3", 3, 3), ("0.5", 0.5, 0.5), ("-3", 0, 0), (in_a_while(), 80_000, 86_400)],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_passed_on(
    server: OpenAIServer, status: int, header: str, low: float, high: float, model: Make
) -> None:
    server.script(Refuse(status, headers={"Retry-After": header}))
    assert low <= (await fault(model())).retry_after_s <= high


@pytest.mark.parametrize("header", ["soon", "inf", "nan", ""])
async def test_a_retry_after_that_cannot_be_read_is_none(
    server: OpenAIServer, header: str, model: Make
) -> None:
    server.script(Refuse(429, headers={"Retry-After": header}))
    assert (await fault(model())).retry_after_s is None


async def test_a_missing_key_is_auth(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, model: Make
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    found = await fault(model())
    assert type(found) is ModelAuth
    assert found.missing == ["OPENAI_API_KEY"]
    assert not server.requests


async def test_a_server_that_is_not_there_is_unavailable(model: Make) -> None:
    with OpenAIServer() as gone:
        url = gone.url
    assert type(await fault(model(api_base=url))) is ModelUnavailable


@pytest.mark.parametrize("mark", [Mark.EOF, Mark.DONE, Mark.CUT, Mark.RESET])
@pytest.mark.parametrize("before", [words("hel", "lo"), [call(0, call_id="a", name="bash")]])
async def test_a_stream_without_its_end_is_cut(
    server: OpenAIServer, mark: Mark, before: list[Event], model: Make
) -> None:
    server.script(Stream([*before, mark]))
    assert type(await fault(model())) is ModelCut


@pytest.mark.parametrize("mark", [Mark.CUT, Mark.RESET])
async def test_a_connection_that_breaks_before_any_chunk_is_unavailable(
    server: OpenAIServer, mark: Mark, model: Make
) -> None:
    server.script(Stream([mark]))
    assert type(await fault(model())) is ModelUnavailable


async def test_a_stream_that_breaks_after_its_end_mark_is_whole(
    server: OpenAIServer, model: Make
) -> None:
    server.script(Stream([*words("a"), chunk(finish_reason="stop"), Mark.CUT]))
    assert (await answer(model())).text == "a"


async def test_a_server_that_never_answers_is_timed_out_and_left(
    server: OpenAIServer, model: Make
) -> None:
    server.script(Silence())
    assert type(await fault(model(first_token_s=0.3))) is ModelTimeout
    assert await asyncio.to_thread(server.requests[0].left.wait, WAIT_S)


async def test_a_server_that_stalls_between_tokens_is_timed_out(
    server: OpenAIServer, model: Make
) -> None:
    server.script(Stream([*words("a"), Mark.STALL]))
    assert type(await fault(model(between_tokens_s=0.3))) is ModelTimeout
    assert await asyncio.to_thread(server.requests[0].left.wait, WAIT_S)


async def test_chunks_without_a_token_do_not_stop_the_clock(
    server: OpenAIServer, model: Make
) -> None:
    empty: list[Event] = [chunk({"role": "assistant", "content": ""}), 0.05]
    server.script(Stream([*empty * 60, *says("late")]))
    assert type(await fault(model(first_token_s=0.5))) is ModelTimeout


async def test_a_call_that_never_ends_is_timed_out_as_a_whole(
    server: OpenAIServer, model: Make
) -> None:
    drip: list[Event] = [*words("a"), 0.05]
    server.script(Stream([*drip * 60, Mark.STALL]))
    assert type(await fault(model(whole_call_s=0.5))) is ModelTimeout


async def test_a_reader_that_dawdles_is_not_held_against_the_provider(
    server: OpenAIServer, model: Make
) -> None:
    server.script(Stream(says("a", "b")))
    async with aclosing(model(between_tokens_s=0.3).stream(REQUEST)) as stream:
        assert await anext(stream) == TextChunk("a")
        assert await asyncio.to_thread(server.requests[0].answered.wait, WAIT_S)
        await asyncio.sleep(0.4)  # the subject: longer than the limit between tokens
        assert [type(item) async for item in stream] == [TextChunk, Completion]


async def test_closing_early_closes_the_connection(server: OpenAIServer, model: Make) -> None:
    server.script(Stream([*words("a"), Mark.STALL]))
    stream = model().stream(REQUEST)
    assert await anext(stream) == TextChunk("a")
    await stream.aclose()
    assert await asyncio.to_thread(server.requests[0].left.wait, WAIT_S)


@pytest.mark.parametrize("behaviour", [Silence(), Stream([*words("a"), Mark.STALL])])
async def test_cancelling_closes_the_connection(
    server: OpenAIServer, behaviour: Silence | Stream, model: Make
) -> None:
    here = asyncio.Event()
    loop = asyncio.get_running_loop()

    def arrived(_: object) -> Silence | Stream:
        loop.call_soon_threadsafe(here.set)
        return behaviour

    server.otherwise = arrived
    asking = asyncio.ensure_future(answer(model()))
    async with asyncio.timeout(WAIT_S):
        await here.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert await asyncio.to_thread(server.requests[0].left.wait, WAIT_S)


async def test_many_calls_at_once_do_not_mix(server: OpenAIServer, model: Make) -> None:
    server.otherwise = lambda received: Stream(says(received.body["messages"][0]["content"]))
    adapter = model()
    asked = [REQUEST._replace(messages=[{"role": "user", "content": str(n)}]) for n in range(20)]
    said = await asyncio.gather(*(answer(adapter, request) for request in asked))
    assert [one.text for one in said] == [str(n) for n in range(20)]


async def test_an_unknown_model_has_the_default_window(model: Make) -> None:
    card = await model(default_window_tokens=5000).card("openai/nobody")
    assert (card.window_tokens, card.priced) == (5000, False)


async def test_the_operators_window_wins(model: Make) -> None:
    adapter = model(windows={"openai/gpt-4o": 7000})
    assert (await adapter.card("openai/gpt-4o")).window_tokens == 7000
