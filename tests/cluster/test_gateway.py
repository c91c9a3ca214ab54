"""The model gateway on real Ray: a session's end in an actor, the model behind Serve."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import ray
from ray import serve

from actors.gateway import DEPLOYMENT, gateway_app
from actors.session import gateway_model
from agent.faults import (
    ModelAuth,
    ModelFault,
    ModelLost,
    ModelRateLimited,
    ModelTimeout,
    ModelUnavailable,
)
from agent.model.contract import ModelRequest
from agent.settings import ModelSettings
from tests.support.openai_server import Mark, OpenAIServer, Refuse, Stream, words

pytestmark = pytest.mark.timeout(120)
WAIT_S = 5
APP = "gateway-under-test"
"""Beside the gateway of the house, which other tests use."""
PROVIDER_MODEL = "hosted_vllm/test"
"""Speaks OpenAI's protocol and needs no key in the replica's environment."""
SILENCE_S = 60.0
SHORT_SILENCE_S = 5.0
"""Shorter than a replica's heartbeat, and enough to find one."""


def puppet(script: str) -> ModelRequest:
    return ModelRequest("scripted/puppet", [{"role": "user", "content": script}])


# Without Ray


def test_importing_the_gateway_does_not_load_litellm() -> None:
    probe = "import sys, actors.gateway; sys.exit('litellm' in sys.modules)"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", probe], timeout=60, check=False)
    assert ran.returncode == 0


# On Ray


@pytest.fixture(scope="module")
def provider() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(ray_cluster: object, provider: OpenAIServer) -> Iterator[None]:
    prices = {PROVIDER_MODEL: {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2}}
    settings = ModelSettings.model_validate(
        {"api_base": provider.url, "max_retries": 1, "retry_base_s": 0.01, "prices": prices}
    )
    serve.run(gateway_app(settings, "scripted/demo"), name=APP, route_prefix=None)
    yield
    serve.delete(APP)


@ray.remote(num_cpus=0)
class Session:
    """The place of a session actor: one loop, a model behind the gateway."""

    def __init__(self) -> None:
        self._model = gateway_model(SILENCE_S, app=APP)
        self._reading: asyncio.Task[Any] | None = None

    async def asked(self, request: ModelRequest) -> list[Any]:
        async with aclosing(self._model.stream(request)) as stream:
            return [item async for item in stream]

    async def fault(self, request: ModelRequest) -> tuple[str, str, dict[str, Any]]:
        try:
            await self.asked(request)
        except ModelFault as fault:
            return type(fault).__name__, fault.detail, fault.fields
        return "none", "", {}

    async def began(self, request: ModelRequest) -> str:
        """Read the first chunk, and go on reading in a task."""
        stream = self._model.stream(request)
        first = await anext(stream)
        self._reading = asyncio.create_task(self._rest(stream))
        return first.text

    async def _rest(self, stream: Any) -> str:
        try:
            async with aclosing(stream):
                return "".join([item.text async for item in stream])
        except ModelFault as fault:
            return type(fault).__name__

    async def cancelled(self) -> bool:
        assert self._reading
        self._reading.cancel()
        await asyncio.wait({self._reading})
        return self._reading.cancelled()

    async def ended(self) -> str:
        assert self._reading
        return await self._reading

    async def card(self, model: str) -> Any:
        return await self._model.card(model)


@pytest.fixture(scope="module")
def session(gateway: None) -> Any:
    return Session.remote()


def got(reference: Any) -> Any:
    return ray.get(reference, timeout=60)


def test_a_session_streams_a_scripted_model_through_the_gateway(session: Any) -> None:
    *chunks, last = got(session.asked.remote(puppet("- {say: hello world, chunks: 4}")))
    assert "".join(chunk.text for chunk in chunks) == "hello world"
    assert (last.text, last.finish_reason, last.cost_usd) == ("hello world", "stop", 0.0)


def test_a_session_reaches_a_provider_through_the_gateway(
    session: Any, provider: OpenAIServer
) -> None:
    provider.script(Refuse(503))
    request = ModelRequest(PROVIDER_MODEL, [{"role": "user", "content": "hi"}])
    last = got(session.asked.remote(request))[-1]
    assert (last.text, last.n_retries) == ("hello", 1)
    assert last.cost_usd == pytest.approx((7 * 1 + 5 * 2) / 1e6)


@pytest.mark.parametrize("kind", [ModelUnavailable, ModelTimeout, ModelAuth, ModelRateLimited])
def test_a_fault_arrives_as_itself(session: Any, kind: type[ModelFault]) -> None:
    name, detail, _ = got(session.fault.remote(puppet(f"- {{say: a, fault: {kind.code}}}")))
    assert (name, detail) == (kind.__name__, "The script says that this call fails.")


def test_a_fault_keeps_its_fields(session: Any, provider: OpenAIServer) -> None:
    provider.script(Refuse(429, headers={"Retry-After": "700"}))
    # A model of its own: nobody is let to a model whose provider asked for that time.
    request = ModelRequest("hosted_vllm/refused", [{"role": "user", "content": "hi"}])
    name, _, fields = got(session.fault.remote(request))
    assert (name, fields) == ("ModelRateLimited", {"retry_after_s": 700.0})


def test_cancelling_in_the_session_closes_the_providers_connection(
    session: Any, provider: OpenAIServer
) -> None:
    provider.script(Stream([*words("a"), Mark.STALL]))
    request = ModelRequest(PROVIDER_MODEL, [{"role": "user", "content": "hi"}])
    assert got(session.began.remote(request)) == "a"
    assert got(session.cancelled.remote())
    assert provider.requests[-1].left.wait(WAIT_S)


def test_many_streams_are_open_at_once(session: Any) -> None:
    request = puppet("- {say: abcdefghij, chunks: 10, delay_s: 0.05}")
    answers = got([session.asked.remote(request) for _ in range(50)])
    assert {answer[-1].text for answer in answers} == {"abcdefghij"}


def test_a_card_comes_from_the_gateway(session: Any) -> None:
    assert got(session.card.remote("scripted/demo")).window_tokens == 128_000


def test_a_killed_replica_is_a_lost_call_and_the_next_call_works(session: Any) -> None:
    assert got(session.began.remote(puppet("- {say: a, hang: true}"))) == "a"
    [replica] = [
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == "serve" and f"{APP}#{DEPLOYMENT}" in actor["name"]
    ]
    ray.kill(ray.get_actor(replica["name"], namespace="serve"))
    assert got(session.ended.remote()) == "ModelLost"
    # Serve starts another replica by itself.
    deadline = time.monotonic() + 60
    while got(session.fault.remote(puppet("- {say: b}")))[0] != "none":
        assert time.monotonic() < deadline
    assert got(session.asked.remote(puppet("- {say: b}")))[-1].text == "b"


def test_a_replica_that_falls_silent_is_lost(gateway: None) -> None:
    async def asked() -> None:
        model = gateway_model(SHORT_SILENCE_S, app=APP)
        async with aclosing(model.stream(puppet("- {say: a, hang: true}"))) as stream:
            assert (await anext(stream)).text == "a"
            with pytest.raises(ModelLost):
                await anext(stream)

    asyncio.run(asked())


def test_without_a_gateway_a_call_is_lost(gateway: None) -> None:
    async def asked() -> None:
        model = gateway_model(SHORT_SILENCE_S, app="troupe-nowhere")
        async with aclosing(model.stream(puppet("- {say: a}"))) as stream:
            await anext(stream)

    with pytest.raises(ModelLost):
        asyncio.run(asked())
