"""Calls at a model's limits: who waits, who goes, what a refusal costs the others."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing

import pytest

from agent.faults import ModelBusy, ModelRateLimited
from agent.model.contract import Completion, Model, ModelCard, ModelRequest, TextChunk
from agent.model.limits import MAX_MODELS, LimitedModel, Limits
from agent.model.retry import MAX_PAUSE_S, RetryingModel
from agent.model.routing import RoutedModel
from agent.settings import ModelLimits, ModelSettings
from agent.testing import Reply, ScriptedModel
from tests.support.openai_server import Behaviour, OpenAIServer, Received, Refuse, Stream, says

WAIT_S = 5
# litellm reads a field of pydantic's in a way that is deprecated, for every usage chunk.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields'")


def asks(session_id: str = "a", model: str = "openai/test") -> ModelRequest:
    return ModelRequest(model, [{"role": "user", "content": "hi"}], session_id=session_id)


def one_at_once(**fields: float) -> ModelSettings:
    return ModelSettings(limits={"*": ModelLimits(concurrency=1)}, **fields)


async def answer(model: Model, request: ModelRequest) -> Completion:
    async with aclosing(model.stream(request)) as stream:
        last = [item async for item in stream][-1]
    assert isinstance(last, Completion)
    return last


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110  counters have no event
            await asyncio.sleep(0)


class Crowd:
    """Calls through one door, each held by a gate of its own once it is inside."""

    def __init__(self, settings: ModelSettings, n: int) -> None:
        self.gates = [asyncio.Event() for _ in range(n)]
        self.inner = ScriptedModel([Reply("ok", gate=gate) for gate in self.gates])
        self.limits = Limits(settings)
        self.model = LimitedModel(self.inner, self.limits)

    def call(self, session_id: str) -> asyncio.Task[Completion]:
        return asyncio.ensure_future(answer(self.model, asks(session_id)))

    def inside(self) -> list[str]:
        """Sessions that were asked for, in order."""
        return [request.session_id for request in self.inner.requests]

    def stats(self) -> tuple[int, int]:
        stats = self.limits.stats()["openai/test"]
        return stats.in_flight, stats.waiting


async def test_a_busy_session_does_not_starve_the_others() -> None:
    crowd = Crowd(one_at_once(), 7)
    calls = [crowd.call(session_id) for session_id in "aaaaabc"]
    await until(lambda: crowd.inside() == ["a"])
    await until(lambda: crowd.stats() == (1, 6))
    for gate in crowd.gates:
        gate.set()
    await asyncio.gather(*calls)
    assert crowd.inside() == ["a", "a", "b", "c", "a", "a", "a"]
    assert crowd.stats() == (0, 0)


async def test_a_cancelled_call_leaves_the_line_or_its_place_at_once() -> None:
    crowd = Crowd(one_at_once(), 3)
    calls = [crowd.call(session_id) for session_id in "abc"]
    await until(lambda: crowd.inside() == ["a"])
    await until(lambda: crowd.stats() == (1, 2))
    calls[1].cancel()
    await until(lambda: crowd.stats() == (1, 1))
    calls[0].cancel()
    await until(lambda: crowd.inside() == ["a", "c"])
    calls[2].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert crowd.stats() == (0, 0)


async def test_a_call_that_is_cancelled_as_its_turn_comes_passes_the_turn_on() -> None:
    crowd = Crowd(one_at_once(), 2)
    calls = [crowd.call(session_id) for session_id in "abc"]
    await until(lambda: crowd.inside() == ["a"])
    await until(lambda: crowd.stats() == (1, 2))
    crowd.gates[0].set()
    await until(lambda: crowd.stats() == (1, 1))  # `b` was let in, and does not know yet
    calls[1].cancel()
    await until(lambda: crowd.inside()[-1] == "c")
    crowd.gates[1].set()
    assert (await calls[2]).text == "ok"
    await asyncio.gather(*calls, return_exceptions=True)
    assert crowd.stats() == (0, 0)


async def test_a_stream_that_is_left_early_gives_its_place_back() -> None:
    inner = ScriptedModel([Reply("many words", chunks=5), Reply("ok")])
    model = LimitedModel(inner, Limits(one_at_once()))
    async with aclosing(model.stream(asks())) as stream:
        assert isinstance(await anext(stream), TextChunk)
    assert (await answer(model, asks())).text == "ok"


async def test_a_call_waits_for_its_turn_only_so_long() -> None:
    crowd = Crowd(one_at_once(limit_wait_s=0.01), 1)
    first = crowd.call("a")
    await until(lambda: crowd.inside() == ["a"])
    with pytest.raises(ModelBusy):
        await crowd.call("b")
    assert crowd.stats() == (1, 0)
    crowd.gates[0].set()
    await first


async def test_a_full_line_refuses_at_once() -> None:
    crowd = Crowd(one_at_once(limit_queue=1), 2)
    calls = [crowd.call("a"), crowd.call("b")]
    await until(lambda: crowd.inside() == ["a"])
    await until(lambda: crowd.stats() == (1, 1))
    with pytest.raises(ModelBusy) as refused:
        await crowd.call("c")
    assert refused.value.retry_after_s > 0
    for gate in crowd.gates:
        gate.set()
    await asyncio.gather(*calls)


async def test_tokens_hold_back_who_would_use_too_many() -> None:
    # 60 tokens are kept; the answer alone is expected to take 500, and one such call may make a debt.
    settings = ModelSettings(limits={"*": ModelLimits(tokens_per_minute=360)}, limit_wait_s=0.05)
    model = LimitedModel(ScriptedModel([Reply("ok"), Reply("ok")]), Limits(settings))
    await answer(model, asks())
    small = asks()._replace(max_output_tokens=1)  # usage has told that the first took few
    await answer(model, small)
    large = asks()._replace(messages=[{"role": "user", "content": "x" * 100_000}])
    with pytest.raises(ModelBusy):
        await answer(model, large)


async def test_who_pauses_before_asking_again_holds_no_place() -> None:
    pausing, go_on = asyncio.Event(), asyncio.Event()

    async def pause(_: float) -> None:
        pausing.set()
        await go_on.wait()

    refused = Reply(fault=ModelRateLimited("x", retry_after_s=0.0))
    inner = ScriptedModel([refused, Reply("second"), Reply("first")])
    settings = one_at_once()
    model = RetryingModel(LimitedModel(inner, Limits(settings)), settings, sleep=pause)
    first = asyncio.ensure_future(answer(model, asks("a")))
    async with asyncio.timeout(WAIT_S):
        await pausing.wait()
        second = await answer(model, asks("b"))
    assert (second.text, second.n_retries) == ("second", 0)
    go_on.set()
    assert (await first)._replace(usage=None, cost_usd=None)[:1] == ("first",)
    assert (await first).n_retries == 1


async def test_nobody_waits_for_a_provider_that_asks_for_too_long() -> None:
    gate = asyncio.Event()
    refused = Reply("", gate=gate, fault=ModelRateLimited("x", retry_after_s=MAX_PAUSE_S + 100))
    inner = ScriptedModel([refused])
    model = LimitedModel(inner, limits := Limits(one_at_once()))
    first = asyncio.ensure_future(answer(model, asks("a")))
    second = asyncio.ensure_future(answer(model, asks("b")))
    await until(lambda: bool(limits.stats()) and limits.stats()["openai/test"].waiting == 1)
    gate.set()
    late = asks("c")
    for call in (first, second):
        with pytest.raises(ModelRateLimited):
            await call
    with pytest.raises(ModelRateLimited) as told:
        await answer(model, late)
    assert MAX_PAUSE_S < told.value.retry_after_s <= MAX_PAUSE_S + 100
    assert len(inner.requests) == 1


class Provider:
    """Takes `room` calls at once and refuses the rest."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.open = 0
        self.n_refused = 0

    async def stream(self, request: ModelRequest) -> AsyncGenerator[TextChunk | Completion]:
        if self.open == self.room:
            self.n_refused += 1
            raise ModelRateLimited("x", retry_after_s=0.001)
        self.open += 1
        try:
            for _ in range(5):
                await asyncio.sleep(0)
                yield TextChunk("x")
            yield Completion("xxxxx", (), "stop", None, None)
        finally:
            self.open -= 1

    async def card(self, model: str) -> ModelCard:
        return ModelCard(1000, priced=False)


async def test_a_limit_that_nobody_told_is_found_with_few_refusals() -> None:
    provider = Provider(room=5)
    settings = ModelSettings(max_retries=6)
    model = RetryingModel(LimitedModel(provider, Limits(settings)), settings)
    calls = [answer(model, asks(f"s{n % 40}")) for n in range(400)]
    async with asyncio.timeout(WAIT_S * 4):
        answers = await asyncio.gather(*calls)
    assert len(answers) == 400
    assert provider.n_refused == sum(each.n_retries for each in answers) <= 20


async def test_patterns_choose_limits_and_shared_ones_have_one_door() -> None:
    limits = Limits(
        ModelSettings(
            limits={
                "*": ModelLimits(concurrency=9),
                "openai/*": ModelLimits(concurrency=8),
                "openai/gpt*": ModelLimits(concurrency=7, shared=True),
            }
        ),
        n_replicas=2,
    )
    own, other = limits.door("openai/a"), limits.door("openai/b")
    assert own is not other
    assert limits.door("openai/a") is own
    assert limits.door("openai/gpt-1") is limits.door("openai/gpt-2")
    limits.door("x/y")
    told = {model: stats.limit for model, stats in limits.stats().items()}
    assert told == {"openai/a": 4, "openai/b": 4, "openai/gpt-1": 3, "openai/gpt-2": 3, "x/y": 4}


async def test_names_that_users_make_up_do_not_fill_the_memory() -> None:
    limits = Limits(ModelSettings())
    held = limits.door("openai/held")
    call = await held.enter(asks())
    for n in range(3 * MAX_MODELS):
        limits.door(f"made/up-{n}")
    assert len(limits.stats()) <= MAX_MODELS
    assert limits.door("openai/held") is held
    held.leave(call)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with OpenAIServer() as server:
        yield server


async def through(settings: ModelSettings, use: Callable[[RoutedModel], Awaitable[None]]) -> None:
    model = RoutedModel(settings)
    try:
        await model.warm("openai/test")
        await use(model)
    finally:
        await model.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_holds_back_every_session_and_costs_one_attempt(
    server: OpenAIServer, direct: bool, status: int
) -> None:
    arrived: list[float] = []

    def refuse_the_first(_: Received) -> Behaviour:
        arrived.append(time.monotonic())
        if len(arrived) == 1:
            return Refuse(status, headers={"Retry-After": "0.3"})
        return Stream(says("hello"))

    async def use(model: RoutedModel) -> None:
        answers = await asyncio.gather(*(answer(model, asks(f"s{n}")) for n in range(5)))
        assert sum(each.n_retries for each in answers) == 1
        stats = model.limits()["openai/test"]
        assert (stats.in_flight, stats.waiting, stats.n_rate_limited) == (0, 0, 1)

    server.otherwise = refuse_the_first
    settings = one_at_once().model_copy(update={"api_base": server.url, "direct": direct})
    await through(settings, use)
    assert len(arrived) == 6
    assert min(arrived[1:]) - arrived[0] >= 0.3


async def test_an_outage_that_names_no_time_holds_nobody_back(server: OpenAIServer) -> None:
    async def use(model: RoutedModel) -> None:
        assert (await answer(model, asks())).n_retries == 1
        assert model.limits()["openai/test"].n_rate_limited == 0

    server.script(Refuse(503))
    await through(ModelSettings(api_base=server.url, retry_base_s=0.01), use)
