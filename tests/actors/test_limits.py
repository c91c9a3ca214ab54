"""Limits of time, as the journal tells of them: over real HTTP, and with a real command."""

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from agent.events import ModelCalled, ToolFinished
from agent.model.routing import model_from
from agent.sandbox.local import open_sandbox
from agent.settings import AgentSettings, ModelSettings, ToolSettings
from agent.testing import Reply
from tests.actors.conftest import MakeStand
from tests.support.house import SOON_S, Wait
from tests.support.openai_server import Behaviour, Mark, OpenAIServer, Silence, Stream, says, words
from tests.support.sandboxes import processes
from tests.support.stand import SAY, SPEC, Stand

DRIP: list[Any] = [*words("a"), 0.05]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with OpenAIServer() as server:
        yield server


@pytest.mark.parametrize(
    ("behaviour", "limits"),
    [
        (Silence(), {"first_token_s": 0.3}),
        (Stream([*words("a"), Mark.STALL]), {"between_tokens_s": 0.3}),
        (Stream([*DRIP * 200, Mark.STALL]), {"whole_call_s": 0.5}),
    ],
    ids=["first token", "between tokens", "whole call"],
)
async def test_a_model_that_takes_too_long_fails_its_turn_and_the_next_is_done(
    stand: MakeStand, server: OpenAIServer, behaviour: Behaviour, limits: dict[str, float]
) -> None:
    server.script(behaviour, Stream(says("in time")))
    settings = ModelSettings.model_validate({"api_base": server.url, "max_retries": 0} | limits)
    model = model_from(settings)
    made = stand(model=model)
    activation = await made.open(SPEC.model_copy(update={"model": "openai/test"}))
    ended = await made.ended(activation, "hello")
    assert (ended.reason, ended.code) == ("failed", "model_timeout")
    assert await asyncio.to_thread(server.requests[0].left.wait, SOON_S)
    assert (await made.ended(activation, "again")).reason == "done"
    assert [called.fault for called in await made.facts(ModelCalled)] == ["model_timeout", None]
    await model.close()


def limited(made: Stand, max_tool_s: float) -> Stand:
    agent = AgentSettings(
        storage_dir=made.kit.agent.storage_dir, tools=ToolSettings(max_tool_s=max_tool_s)
    )
    made.kit = replace(made.kit, agent=agent)
    return made


class Watched(Wait):
    """Says that it was ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = False

    async def run(self, arguments: Any, scope: Any) -> Any:
        try:
            return await super().run(arguments, scope)
        finally:
            self.ended = True


async def test_a_tool_that_never_ends_is_ended_and_the_turn_goes_on(stand: MakeStand) -> None:
    tool = Watched()
    calls = Reply(tool_calls=(("wait", {}), ("echo", {"word": "beside it"})))
    made = limited(stand(calls, SAY, tools=[tool]), 0.1)
    assert (await made.ended(await made.open(), "go")).reason == "done"
    found = {fact.tool: fact for fact in await made.facts(ToolFinished)}
    assert (found["wait"].outcome, "0.1 s" in found["wait"].text) == ("error", True)
    assert (found["echo"].outcome, found["echo"].text) == ("ok", "beside it")
    assert tool.ended


async def test_a_command_over_the_limit_of_any_call_leaves_no_process(stand: MakeStand) -> None:
    mark = f"600.{uuid.uuid4().int % 10**12:012d}"
    command = f"bash -c 'sleep {mark}; :' & sleep {mark}"
    calls = Reply(tool_calls=(("bash", {"command": command}),))
    made = limited(stand(calls, SAY, open_sandbox=open_sandbox), 2.0)
    assert (await made.ended(await made.open(), "go")).reason == "done"
    [finished] = await made.facts(ToolFinished)
    assert (finished.outcome, "2 s" in finished.text) == ("error", True)
    assert await asyncio.to_thread(processes, mark) == []
