"""Names reach the adapter that they should."""

from collections.abc import Iterator
from contextlib import aclosing

import pytest

from agent.faults import ModelUnavailable
from agent.model.contract import Completion, ModelRequest
from agent.model.routing import RoutedModel
from agent.settings import ModelSettings
from tests.support.openai_server import OpenAIServer, Refuse

REQUEST = ModelRequest("openai/test", [{"role": "user", "content": "hi"}])
# litellm reads a field of pydantic's in a way that is deprecated, for every usage chunk.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields'")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with OpenAIServer() as server:
        yield server


async def said(settings: ModelSettings, model: str = REQUEST.model) -> Completion:
    routed = RoutedModel(settings)
    try:
        await routed.warm(model)
        async with aclosing(routed.stream(REQUEST._replace(model=model))) as stream:
            last = [item async for item in stream][-1]
    finally:
        await routed.close()
    assert isinstance(last, Completion)
    return last


@pytest.mark.parametrize(("direct", "asks"), [(True, "troupe"), (False, "OpenAI")])
async def test_the_switch_chooses_who_asks(server: OpenAIServer, direct: bool, asks: str) -> None:
    assert (await said(ModelSettings(api_base=server.url, direct=direct))).text == "hello"
    assert asks in server.requests[0].headers["user-agent"]


async def test_a_direct_call_is_repeated_as_others_are(server: OpenAIServer) -> None:
    server.script(Refuse(503, headers={"Retry-After": "0"}))
    assert (await said(ModelSettings(api_base=server.url))).n_retries == 1
    server.script(Refuse(503))
    with pytest.raises(ModelUnavailable):
        await said(ModelSettings(api_base=server.url, max_retries=0))


async def test_scripts_ask_nobody(server: OpenAIServer) -> None:
    await said(ModelSettings(api_base=server.url), "scripted/echo")
    assert not server.requests
