"""Retries: only before the first chunk, only for what may pass, at the provider's pace."""

import asyncio
from contextlib import aclosing

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
from agent.model.contract import Completion, ModelRequest
from agent.model.retry import MAX_PAUSE_S, PASSING, RetryingModel
from agent.settings import ModelSettings
from agent.testing import Reply, ScriptedModel

REQUEST = ModelRequest("any", [{"role": "user", "content": "hi"}])
SETTINGS = ModelSettings(max_retries=2, retry_base_s=1.0)


class Waits:
    """A clock that only writes down how long it was asked to wait."""

    def __init__(self) -> None:
        self.s: list[float] = []

    async def __call__(self, wait_s: float) -> None:
        self.s.append(wait_s)


def most(low: float, high: float) -> float:
    assert low == 0.0
    return high


def retrying(inner: ScriptedModel, waits: Waits) -> RetryingModel:
    return RetryingModel(inner, SETTINGS, sleep=waits, jitter=most)


async def answer(model: RetryingModel) -> Completion:
    async with aclosing(model.stream(REQUEST)) as stream:
        last = [item async for item in stream][-1]
    assert isinstance(last, Completion)
    return last


@pytest.mark.parametrize("kind", PASSING)
async def test_a_fault_that_may_pass_is_retried_and_counted(kind: type[ModelFault]) -> None:
    inner = ScriptedModel([Reply(fault=kind("x")), Reply(fault=kind("x")), Reply("ok")])
    waits = Waits()
    said = await answer(retrying(inner, waits))
    assert (said.text, said.n_retries) == ("ok", 2)
    assert waits.s == [1.0, 2.0]


async def test_the_last_fault_is_raised_when_retries_run_out() -> None:
    inner = ScriptedModel([Reply(fault=ModelUnavailable(str(n))) for n in range(5)])
    with pytest.raises(ModelUnavailable, match="2"):
        await answer(retrying(inner, Waits()))
    assert len(inner.requests) == 3


@pytest.mark.parametrize("kind", [ModelAuth, ModelRefused, ContextOverflow, ModelFault])
async def test_a_fault_that_will_not_pass_is_raised_at_once(kind: type[ModelFault]) -> None:
    inner, waits = ScriptedModel([Reply(fault=kind("x")), Reply("ok")]), Waits()
    with pytest.raises(kind):
        await answer(retrying(inner, waits))
    assert waits.s == []


@pytest.mark.parametrize("shown", [Reply("par"), Reply(reasoning="hm")])
async def test_nothing_is_repeated_once_something_was_shown(shown: Reply) -> None:
    inner = ScriptedModel([shown._replace(fault=ModelCut("x")), Reply("ok")])
    with pytest.raises(ModelCut):
        await answer(retrying(inner, Waits()))
    assert len(inner.requests) == 1


async def test_the_providers_retry_after_wins() -> None:
    limited = Reply(fault=ModelRateLimited("x", retry_after_s=7.5))
    waits = Waits()
    await answer(retrying(ScriptedModel([limited, Reply("ok")]), waits))
    assert waits.s == [7.5]


async def test_a_provider_that_asks_for_too_long_is_not_waited_for() -> None:
    limited = Reply(fault=ModelRateLimited("x", retry_after_s=MAX_PAUSE_S + 1))
    waits = Waits()
    with pytest.raises(ModelRateLimited):
        await answer(retrying(ScriptedModel([limited, Reply("ok")]), waits))
    assert waits.s == []


async def test_a_pause_has_a_limit() -> None:
    settings = ModelSettings(max_retries=1, retry_base_s=1000.0)
    inner, waits = ScriptedModel([Reply(fault=ModelTimeout("x")), Reply("ok")]), Waits()
    await answer(RetryingModel(inner, settings, sleep=waits, jitter=most))
    assert waits.s == [MAX_PAUSE_S]


async def test_a_pause_ends_at_once_when_the_call_is_cancelled() -> None:
    pausing = asyncio.Event()

    async def sleep(_: float) -> None:
        pausing.set()
        await asyncio.Event().wait()

    inner = ScriptedModel([Reply(fault=ModelTimeout("x")), Reply("ok")])
    call = asyncio.ensure_future(answer(RetryingModel(inner, SETTINGS, sleep=sleep)))
    async with asyncio.timeout(5):
        await pausing.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert len(inner.requests) == 1


async def test_an_answer_in_one_piece_that_did_not_come_is_streamed_the_next_time() -> None:
    inner = ScriptedModel([Reply(fault=ModelCut("x")), Reply("ok")])
    model = retrying(inner, Waits())
    async with aclosing(model.stream(REQUEST._replace(stream=False))) as stream:
        assert [item async for item in stream]
    assert [request.stream for request in inner.requests] == [False, True]
