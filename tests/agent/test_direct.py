"""What only the direct way does, or does better than litellm: connections, bounds, odd servers."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
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
from agent.model.answers import Pace
from agent.model.contract import Completion, ModelRequest, ReasoningChunk, TextChunk
from agent.model.direct import MAX_EVENT_BYTES, DirectModel
from agent.settings import ModelSettings
from tests.support.openai_server import (
    Behaviour,
    Mark,
    OpenAIServer,
    Raw,
    Refuse,
    Stream,
    Whole,
    chunk,
    says,
    words,
)

REQUEST = ModelRequest("hosted_vllm/test", [{"role": "user", "content": "hi"}])
JSON = {"Content-Type": "application/json"}
STOP = chunk(finish_reason="stop")
pytestmark = pytest.mark.usefixtures("no_blocking_calls")


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(keep_alive=True) as server:
        yield server


@pytest.fixture
async def model(server: OpenAIServer) -> AsyncIterator[DirectModel]:
    model = DirectModel(ModelSettings(api_base=server.url))
    yield model
    await model.close()


async def items(model: DirectModel, request: ModelRequest = REQUEST) -> list[Any]:
    async with aclosing(model.stream(request)) as stream:
        return [item async for item in stream]


async def fault(model: DirectModel) -> ModelFault:
    with pytest.raises(ModelFault) as caught:
        await items(model)
    return caught.value


def sse(*events: Any) -> bytes:
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)


def raw(body: bytes, **headers: str) -> Raw:
    return Raw([body], {"Content-Type": "text/event-stream"} | headers)


async def test_calls_share_a_connection(server: OpenAIServer, model: DirectModel) -> None:
    server.script(Stream(says("a")), Whole({"content": "b"}), Refuse(500), Stream(says("c")))
    await items(model)
    await items(model, REQUEST._replace(stream=False))
    await fault(model)
    assert (await items(model))[-1].text == "c"
    assert server.n_connections == 1


async def test_a_call_that_was_left_takes_its_connection_along(
    server: OpenAIServer, model: DirectModel
) -> None:
    server.script(Stream([*words("a"), Mark.STALL]), Stream(says("b")))
    stream = model.stream(REQUEST)
    assert await anext(stream) == TextChunk("a")
    await stream.aclose()
    assert (await items(model))[-1].text == "b"
    assert server.n_connections == 2


async def test_a_server_that_goes_on_after_the_end_mark_is_not_waited_for(
    server: OpenAIServer, model: DirectModel
) -> None:
    server.script(Stream([*says("a"), Mark.STALL]))
    assert (await items(model))[-1].text == "a"


async def test_a_running_count_of_usage_is_no_end(server: OpenAIServer, model: DirectModel) -> None:
    counted = words("a")[0] | {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    server.script(Stream([counted, Mark.DONE]))
    assert type(await fault(model)) is ModelCut


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Raw([b'{"error": {"message": "no", "code": "429"}}'], JSON), ModelRateLimited),
        (Raw([b'{"error": {"message": "no", "type": "invalid_request_error"}}'], JSON), ModelRefused),
        (Raw([b'{"error": "overloaded", "error_type": "overloaded"}'], JSON), ModelUnavailable),
        (Raw([b'{"object": "error", "message": "no", "code": 401}'], JSON), ModelAuth),
        (Raw([b"<html>hello</html>"], {"Content-Type": "text/html"}), ModelUnavailable),
        (Raw([b"[]"], JSON), ModelFault),
        (Raw([b'"text"'], JSON), ModelFault),
        (Raw([b'{"choices": [{"message": {"content": 5}}]}'], JSON), ModelFault),
        (Raw([b"{}"], JSON), ModelCut),
        (raw(b": OPENROUTER PROCESSING\n\n"), ModelCut),
        (raw(b""), ModelCut),
        (raw(b"data: {\n\n"), ModelUnavailable),
        (raw(sse(words("a")[0]) + b"data: {\n\n"), ModelCut),
        (raw(b"data: \xff\xfe\n\n"), ModelUnavailable),
        (raw(sse({"choices": "x"})), ModelFault),
        (raw(sse({"choices": [{"delta": {"tool_calls": [7]}}]})), ModelFault),
        (raw(sse({"error": {"message": "maximum context length is 5", "code": 400}})), ContextOverflow),
        (raw(b"neither", **{"Content-Encoding": "gzip"}), ModelUnavailable),
        (Raw([b""], {"Location": "/v2"}, 307), ModelRefused),
        (Raw([b"x" * 100_000], {"Content-Type": "text/html"}, 502), ModelUnavailable),
        (Raw([b"maximum context length is 10 tokens"], {}, 413), ContextOverflow),
        (Refuse(408), ModelFault),
    ],
)  # fmt: skip
async def test_an_odd_answer_becomes_its_fault(
    server: OpenAIServer, model: DirectModel, behaviour: Behaviour, kind: type[ModelFault]
) -> None:
    server.script(behaviour)
    found = await fault(model)
    assert isinstance(found, kind)
    assert kind is ModelFault or type(found) is kind
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        Whole({"content": "a"}),
        raw(gzip.compress(sse(*words("a"), STOP)), **{"Content-Encoding": "gzip"}),
        Raw([sse(*words("a"), STOP)], {}),
        raw(b"event: message\nid: 1\nretry: 5\n" + sse(*words("a"), STOP)),
        raw(b"data:" + sse(words("a")[0])[6:] + sse(STOP)),
        raw(sse(words("a")[0]).replace(b", ", b",\ndata: ") + sse(STOP)),
    ],
    ids=["json", "gzip", "no type", "fields", "no space", "lines"],
)  # fmt: skip
async def test_an_odd_answer_is_an_answer(
    server: OpenAIServer, model: DirectModel, behaviour: Behaviour
) -> None:
    server.script(behaviour)
    first, *_, last = await items(model)
    assert first == TextChunk("a")
    assert isinstance(last, Completion)
    assert last.text == "a"


async def test_content_in_parts_is_text_and_reasoning(
    server: OpenAIServer, model: DirectModel
) -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [thought, {"type": "text", "text": "so"}]
    server.script(Stream([chunk({"content": parts}), STOP, Mark.DONE]))
    assert (await items(model))[:2] == [ReasoningChunk("hm"), TextChunk("so")]


async def test_a_tools_arguments_may_come_as_an_object(
    server: OpenAIServer, model: DirectModel
) -> None:
    calls = [{"function": {"name": name, "arguments": {"n": 1}}} for name in ("bash", "bash")]
    server.script(Stream([chunk({"tool_calls": calls}, finish_reason="tool_calls"), Mark.DONE]))
    said = (await items(model))[-1]
    assert [call.arguments for call in said.tool_calls] == ['{"n": 1}'] * 2


async def test_half_a_character_in_a_message_does_not_stop_the_call(
    server: OpenAIServer, model: DirectModel
) -> None:
    messages = [{"role": "user", "content": "a\ud83d ü"}]
    await items(model, REQUEST._replace(messages=messages))
    assert server.requests[0].body["messages"][0]["content"] == "a? ü"


async def test_a_long_event_is_read_whole(server: OpenAIServer, model: DirectModel) -> None:
    text = "x" * (MAX_EVENT_BYTES - 100_000)
    server.script(Raw([sse(words(text)[0], STOP)]))
    assert (await items(model))[-1].text == text


def endless(piece: bytes) -> Iterable[bytes]:
    return [piece * 4096] * (2 * MAX_EVENT_BYTES // (4096 * len(piece)))


@pytest.mark.parametrize(
    "piece", [b"xxxxxxxxxxxxxxxx", b"data: xxxxxxxxx\n", b": keep-alive\n\n12"]
)
async def test_an_event_without_end_is_given_up(
    server: OpenAIServer, model: DirectModel, piece: bytes
) -> None:
    server.script(Raw(endless(piece)))
    found = await fault(model)
    assert type(found) is ModelFault
    assert "more than" in str(found)


async def test_a_compressed_event_is_measured_uncompressed(
    server: OpenAIServer, model: DirectModel
) -> None:
    bomb = gzip.compress(b"x" * (MAX_EVENT_BYTES * 4))
    server.script(raw(bomb, **{"Content-Encoding": "gzip"}))
    assert type(await fault(model)) is ModelFault


async def test_an_answer_in_one_piece_has_no_first_token() -> None:
    settings = ModelSettings(first_token_s=0.01, whole_call_s=5)
    late = 0.05  # the subject: longer than the limit of a first token
    assert (
        await Pace(settings, REQUEST._replace(stream=False)).of(asyncio.sleep(late, "all")) == "all"
    )
    with pytest.raises(ModelTimeout):
        await Pace(settings, REQUEST).of(asyncio.sleep(late))
