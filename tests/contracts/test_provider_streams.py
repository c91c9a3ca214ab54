"""Streams as providers write them, which both adapters must read alike.

The files in `tests/support/streams` are hand-written after the public format of each provider (its API
reference, or the source of its server), since no provider can be reached from where tests run. They
are no recordings.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import NamedTuple

import pytest

from agent.events import Usage
from agent.model.contract import Completion, Model, ModelRequest, ReasoningChunk, TextChunk
from agent.model.direct import DirectModel
from agent.model.litellm_adapter import LitellmModel, load_litellm
from agent.settings import ModelSettings
from tests.support.openai_server import OpenAIServer, Raw

STREAMS = Path(__file__).parent.parent / "support" / "streams"
# litellm reads a field of pydantic's in a way that is deprecated, for every usage chunk.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields'")


class Said(NamedTuple):
    usage: Usage
    text: tuple[str, ...] = ()
    """As it was shown."""
    reasoning: tuple[str, ...] = ()
    calls: tuple[tuple[str, str, str], ...] = ()
    """Id, tool and arguments."""
    finish_reason: str = "stop"


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Usage:
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        reasoning_tokens=reasoning,
    )


LS = '{"command":"ls"}'
SPACED_LS = '{"command": "ls"}'
SAID = {
    "openai_text": Said(usage(1200, 9, cached=1024), ("Grüße", ", 世界 🌍!")),
    "openai_tools": Said(
        usage(82, 34),
        calls=(("call_a1", "bash", LS), ("call_b2", "read", '{"path":"a.py"}')),
        finish_reason="tool_calls",
    ),
    "vllm_reasoning": Said(usage(14, 8), ("4", "."), ("Two and ", "two.")),
    "vllm_tools": Said(
        usage(160, 21),
        reasoning=("List it.",),
        calls=(("chatcmpl-tool-9c", "bash", SPACED_LS),),
        finish_reason="tool_calls",
    ),
    "hf_tgi": Said(usage(5, 3), ("Hel", "lo")),
    "openrouter": Said(usage(20, 6, cached=16, reasoning=2), ("Yes",), ("Hm",)),
    "deepseek": Said(usage(100, 12, cached=64, reasoning=7), ("Done",), ("Think",)),
    "mistral_tools": Said(
        usage(90, 30),
        calls=(("D681PevKs", "bash", SPACED_LS), ("9aBcDeFgH", "read", '{"path": "a"}')),
        finish_reason="tool_calls",
    ),
    "gemini_tools": Said(
        usage(50, 18),
        calls=(("function-call-1", "bash", LS), ("function-call-2", "bash", '{"command":"pwd"}')),
        finish_reason="tool_calls",
    ),
    "ollama_tools": Said(
        usage(33, 11),
        reasoning=("ok",),
        calls=(("call_q1", "bash", LS),),
        finish_reason="tool_calls",
    ),
    "repeated_ids": Said(
        usage(12, 4), ("Go",), calls=(("call_z", "bash", SPACED_LS),), finish_reason="tool_calls"
    ),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", "sk-test")
    with OpenAIServer() as server:
        yield server


@pytest.fixture(params=["litellm", "direct"])
async def model(request: pytest.FixtureRequest, server: OpenAIServer) -> AsyncIterator[Model]:
    settings = ModelSettings(api_base=server.url)
    direct = DirectModel(settings)
    if request.param == "litellm":
        load_litellm()
    yield direct if request.param == "direct" else LitellmModel(settings)
    await direct.close()


def cut(stream: bytes, size: int) -> list[bytes]:
    """Pieces that end inside lines and inside characters."""
    return [stream[at : at + size] for at in range(0, len(stream), size)]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize(("newline", "size"), [(b"\n", 100_000), (b"\r\n", 7)])
@pytest.mark.parametrize("name", SAID)
async def test_a_providers_stream_is_read_alike(
    server: OpenAIServer, model: Model, name: str, newline: bytes, size: int, provider: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    stream = (STREAMS / f"{name}.sse").read_bytes().replace(b"\n", newline)
    server.script(Raw(cut(stream, size)))
    request = ModelRequest(f"{provider}/test", [{"role": "user", "content": "hi"}])
    async with aclosing(model.stream(request)) as source:
        *chunks, last = [item async for item in source]
    assert isinstance(last, Completion)
    said = SAID[name]
    assert [c.text for c in chunks if isinstance(c, TextChunk)] == list(said.text)
    assert [c.text for c in chunks if isinstance(c, ReasoningChunk)] == list(said.reasoning)
    assert (last.text, last.reasoning) == ("".join(said.text), "".join(said.reasoning))
    assert [(c.tool_call_id, c.tool, c.arguments) for c in last.tool_calls] == list(said.calls)
    assert (last.finish_reason, last.usage) == (said.finish_reason, said.usage)


def test_every_stream_is_read() -> None:
    assert {path.stem for path in STREAMS.glob("*.sse")} == SAID.keys()
