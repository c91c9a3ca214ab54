"""The shipped scripted models."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from agent.context import NEW_SHELL
from agent.faults import ModelRefused, ModelUnavailable
from agent.model.contract import Completion, Model, ModelRequest, ReasoningChunk, TextChunk
from agent.testing import NamedScripts, Reply, ScriptedModel, scripted_model
from agent.testing.model import cut


def asked(text: str, model: str = "scripted/puppet") -> ModelRequest:
    return ModelRequest(model, [{"role": "user", "content": text}])


async def answer(model: Model, request: ModelRequest) -> Completion:
    items = [item async for item in model.stream(request)]
    assert isinstance(items[-1], Completion)
    return items[-1]


def continued(request: ModelRequest, said: Completion, results: list[str]) -> ModelRequest:
    """The request after the calls of `said` were run with `results`."""
    calls = [
        {
            "id": call.tool_call_id,
            "type": "function",
            "function": {"name": call.tool, "arguments": call.arguments},
        }
        for call in said.tool_calls
    ]
    assistant: dict[str, Any] = {"role": "assistant", "content": said.text}
    if calls:
        assistant["tool_calls"] = calls
    tools = [
        {"role": "tool", "tool_call_id": call["id"], "content": result}
        for call, result in zip(calls, results, strict=True)
    ]
    return request._replace(messages=[*request.messages, assistant, *tools])


async def test_replies_come_in_order_and_requests_are_recorded() -> None:
    model = ScriptedModel([Reply("one"), Reply(tool_calls=(("bash", {"command": "ls"}),))])
    first, second = await answer(model, asked("a")), await answer(model, asked("b"))
    assert (first.text, first.finish_reason) == ("one", "stop")
    assert [(c.tool, json.loads(c.arguments)) for c in second.tool_calls] == [
        ("bash", {"command": "ls"})
    ]
    assert second.finish_reason == "tool_calls"
    assert [request.messages[0]["content"] for request in model.requests] == ["a", "b"]


async def test_a_call_beyond_the_script_is_refused() -> None:
    with pytest.raises(ModelRefused):
        await answer(ScriptedModel([]), asked("a"))


async def test_a_gate_holds_the_stream_where_it_stands() -> None:
    gate = asyncio.Event()
    model = ScriptedModel([Reply("abcd", chunks=2, gate=gate, gate_after=1)])
    async with aclosing(model.stream(asked("a"))) as stream:
        assert await anext(stream) == TextChunk("ab")
        held = asyncio.ensure_future(anext(stream))
        done, _ = await asyncio.wait({held}, timeout=0)
        assert not done
        gate.set()
        assert await held == TextChunk("cd")


async def test_a_fault_comes_after_the_text() -> None:
    model = ScriptedModel([Reply("ab", reasoning="hm", fault=ModelUnavailable("gone"))])
    async with aclosing(model.stream(asked("a"))) as stream:
        assert [await anext(stream), await anext(stream)] == [ReasoningChunk("hm"), TextChunk("ab")]
        with pytest.raises(ModelUnavailable):
            await anext(stream)


async def test_the_demo_plays_its_task_and_tells_the_real_results() -> None:
    model, request, tools = scripted_model(), asked("squares please", "scripted/demo"), []
    said = await answer(model, request)
    while said.tool_calls:
        names = [call.tool for call in said.tool_calls]
        tools += names
        request = continued(request, said, [f"<{name} {len(tools)}>" for name in names])
        said = await answer(model, request)
    assert tools == ["plan", "write", "plan", "bash", "read", "plan"]
    assert "squares please" in said.text
    assert "<bash 4>" in said.text
    assert "<read 6>" in said.text


async def test_the_demo_begins_anew_with_the_next_user_message() -> None:
    model, request = scripted_model(), asked("first", "scripted/demo")
    first = await answer(model, request)
    again = continued(request, first, ["ok"])
    again = again._replace(messages=[*again.messages, {"role": "user", "content": "second"}])
    assert (await answer(model, again)).text == first.text


async def test_two_replicas_give_the_same_answer() -> None:
    request = asked("- {call: bash, args: {command: ls}}")
    assert await answer(scripted_model(), request) == await answer(scripted_model(), request)


async def test_ids_of_calls_differ_within_a_conversation() -> None:
    request = asked("- {call: bash}\n- {calls: [{call: bash}, {call: read, args: '{broken'}]}")
    first = await answer(scripted_model(), request)
    second = await answer(scripted_model(), continued(request, first, ["ok"]))
    assert len({c.tool_call_id for c in (*first.tool_calls, *second.tool_calls)}) == 3
    assert second.tool_calls[1].arguments == "{broken"


async def test_a_puppet_does_its_steps_then_says_done() -> None:
    request = asked("- {say: hello, chunks: 5}\n- {say: bye}")
    items = [item async for item in scripted_model().stream(request)]
    assert [item.text for item in items if isinstance(item, TextChunk)] == list("hello")
    request = continued(request, items[-1], [])  # type: ignore[arg-type]
    second = await answer(scripted_model(), request)
    assert second.text == "bye"
    assert (await answer(scripted_model(), continued(request, second, []))).text == "done"


async def test_a_puppet_keeps_its_place_when_it_is_told_of_a_new_shell() -> None:
    first = asked("[{say: one, call: bash, args: {command: ls}}, {say: two}]")
    second = continued(first, await answer(scripted_model(), first), ["unknown"])
    second.messages.append({"role": "user", "content": NEW_SHELL})
    assert (await answer(scripted_model(), second)).text == "two"


async def test_a_puppet_fails_with_the_fault_it_is_told() -> None:
    with pytest.raises(ModelUnavailable):
        await answer(scripted_model(), asked("- {fault: model_unavailable}"))


@pytest.mark.parametrize(
    "text", ["hello there", "", "{a: 1}", "- {sing: la}", "- [", "[" * 5000, "- 2020-99-99"]
)
async def test_a_text_that_is_no_script_is_told_so(text: str) -> None:
    assert "not a puppet script" in (await answer(scripted_model(), asked(text))).text


async def test_a_hanging_puppet_ends_when_it_is_cancelled() -> None:
    task = asyncio.ensure_future(answer(scripted_model(), asked("- {say: hm, hang: true}")))
    await asyncio.wait({task}, timeout=0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_echo_repeats_the_last_user_text_of_parts_too() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ModelRequest("scripted/echo", [{"role": "user", "content": parts}])
    assert (await answer(scripted_model(), request)).text == "ab"


@pytest.mark.parametrize("kind", ["compaction", "seed"])
async def test_a_summary_names_how_many_messages_it_saw(kind: Any) -> None:
    said = await answer(scripted_model(), asked("x")._replace(kind=kind))
    assert "1 messages" in said.text


async def test_an_unknown_script_is_refused() -> None:
    with pytest.raises(ModelRefused):
        await answer(scripted_model(), asked("x", "scripted/none"))


async def test_the_window_is_as_constructed() -> None:
    card = await NamedScripts(window_tokens=2000).card("scripted/echo")
    assert (card.window_tokens, card.priced) == (2000, True)


@pytest.mark.parametrize(("text", "n"), [("", 3), ("abc", 5), ("abcdefg", 3), ("x" * 1000, 7)])
def test_a_cut_text_joins_to_itself_in_few_pieces(text: str, n: int) -> None:
    pieces = cut(text, n)
    assert "".join(pieces) == text
    assert len(pieces) <= n
    assert all(pieces)
