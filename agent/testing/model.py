"""Models without a provider: scripted, deterministic, free.

`ScriptedModel` plays replies that a test hands it, one per call. `NamedScripts` needs no hands: the
model's name picks the script and the messages of the request pick the step, so it keeps no state
and works behind any number of replicas:

    scripted/demo     does a small real task with `plan`, `write`, `bash` and `read`, then tells of it
    scripted/echo     answers with the last user text
    scripted/puppet   does what the last user text says: a YAML list of `Step`s, one model call each
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from agent.events import ToolCall, Usage
from agent.faults import ModelFault, ModelRefused, ModelTimeout
from agent.model.contract import Completion, ModelCard, ModelRequest, ReasoningChunk, TextChunk

WINDOW_TOKENS = 128_000
HANG_S = 3600.0
"""How long a reply that hangs does so: longer than any limit of time in the settings."""
CHARS_PER_TOKEN = 4
"""The usual rule of thumb for English."""


class Reply(NamedTuple):
    """What the model does in one call: the text, then the calls, then the end or the fault."""

    text: str = ""
    tool_calls: tuple[tuple[str, dict[str, Any] | str], ...] = ()
    """Tool and arguments; a string is passed on as it is, so it may be broken JSON."""
    chunks: int = 1
    """Pieces that the text is cut into; fewer when it has fewer characters."""
    delay_s: float = 0.0
    """Before each piece."""
    reasoning: str = ""
    finish_reason: str | None = None
    """None: `tool_calls` or `stop`."""
    usage: Usage | None = None
    """None: counted from the characters."""
    cost_usd: float | None = 0.0
    fault: ModelFault | None = None
    """Raised after the text."""
    hang: bool = False
    """Never end after the text."""
    gate: asyncio.Event | None = None
    """The stream waits here until the event is set."""
    gate_after: int = 0
    """Pieces of text that pass before the gate."""


class ScriptedModel:
    """Plays `replies`, one per call in the order of the calls, whatever their model or kind.

    A call beyond the last reply is ModelRefused. `requests` holds every request it got.
    """

    def __init__(self, replies: Sequence[Reply], *, window_tokens: int = WINDOW_TOKENS) -> None:
        self.requests: list[ModelRequest] = []
        self._replies = list(replies)
        self._card = ModelCard(window_tokens, priced=True)

    def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        self.requests.append(request)
        if len(self.requests) > len(self._replies):
            return play(Reply(fault=ModelRefused("The scripted model has no reply left.")), request)
        return play(self._replies[len(self.requests) - 1], request)

    async def card(self, model: str) -> ModelCard:  # noqa: ARG002  one card for every name
        return self._card


class NamedScripts:
    """The shipped scripts, by the name of the model. Stateless."""

    def __init__(self, *, window_tokens: int = WINDOW_TOKENS) -> None:
        self._card = ModelCard(window_tokens, priced=True)

    def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        return play(scripted_reply(request), request)

    async def card(self, model: str) -> ModelCard:  # noqa: ARG002  one card for every script
        return self._card


def scripted_model() -> NamedScripts:
    return NamedScripts()


async def play(
    reply: Reply, request: ModelRequest
) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
    if reply.reasoning:
        yield ReasoningChunk(reply.reasoning)
    pieces = cut(reply.text, reply.chunks)
    for n, piece in enumerate(pieces):
        await _hold(reply, n)
        await asyncio.sleep(reply.delay_s)
        yield TextChunk(piece)
    await _hold(reply, len(pieces))
    if reply.hang:
        await asyncio.sleep(HANG_S)
        raise ModelTimeout("The scripted model hung, as its script says.")
    if reply.fault:
        raise reply.fault
    calls = _tool_calls(reply, request)
    yield Completion(
        text=reply.text,
        tool_calls=calls,
        finish_reason=reply.finish_reason or ("tool_calls" if calls else "stop"),
        usage=reply.usage or _counted(request, reply, calls),
        cost_usd=reply.cost_usd,
        reasoning=reply.reasoning,
    )


async def _hold(reply: Reply, n_shown: int) -> None:
    if reply.gate and n_shown == reply.gate_after:
        await reply.gate.wait()


def cut(text: str, n: int) -> list[str]:
    """The text in at most `n` pieces of about the same length, none of them empty."""
    size = max(1, -(-len(text) // max(1, n)))
    return [text[at : at + size] for at in range(0, len(text), size)]


def _tool_calls(reply: Reply, request: ModelRequest) -> tuple[ToolCall, ...]:
    # Derived from the request, so that the ids of one conversation differ without any state.
    digest = hashlib.sha256(json.dumps(request.messages).encode()).hexdigest()[:10]
    return tuple(
        ToolCall(
            tool_call_id=f"call_{digest}_{n}",
            tool=tool,
            arguments=arguments if isinstance(arguments, str) else json.dumps(arguments),
        )
        for n, (tool, arguments) in enumerate(reply.tool_calls)
    )


def _counted(request: ModelRequest, reply: Reply, calls: Sequence[ToolCall]) -> Usage:
    asked = sum(len(json.dumps(part)) for part in (*request.messages, *request.tools))
    reasoning_tokens = -(-len(reply.reasoning) // CHARS_PER_TOKEN)
    said = len(reply.text) + sum(len(call.tool) + len(call.arguments) for call in calls)
    return Usage(
        prompt_tokens=-(-asked // CHARS_PER_TOKEN),
        completion_tokens=-(-said // CHARS_PER_TOKEN) + reasoning_tokens,
        reasoning_tokens=reasoning_tokens,
    )


# What a named script reads out of the request


class Place(NamedTuple):
    """Where a conversation stands."""

    asked: str
    """The last user text."""
    step: int
    """Model calls that were answered since."""
    results: dict[str, str]
    """Each tool's last result since."""


def place(messages: Sequence[dict[str, Any]]) -> Place:
    users = [n for n, m in enumerate(messages) if m["role"] == "user"]
    # In the middle of a turn the model may be told of a new shell or a lost file.
    last = max(
        (n for n in users if not is_note(text_of(messages[n]))), default=max(users, default=-1)
    )
    since = messages[last + 1 :]
    tools = {
        call["id"]: call["function"]["name"]
        for message in since
        for call in message.get("tool_calls") or ()
    }
    return Place(
        asked=text_of(messages[last]) if last >= 0 else "",
        step=sum(m["role"] == "assistant" for m in since),
        results={tools[m["tool_call_id"]]: text_of(m) for m in since if m["role"] == "tool"},
    )


def is_note(text: str) -> bool:
    """Whether it has the form of what is told beside the user's own words: a sentence in brackets."""
    return text.startswith("[") and text.endswith(".]")


def text_of(message: dict[str, Any]) -> str:
    """The text of a chat message, whose content may be a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def scripted_reply(request: ModelRequest) -> Reply:
    if request.kind != "main":
        return Reply(f"Summary ({request.kind}) of {len(request.messages)} messages.", chunks=3)
    at = place(request.messages)
    match request.model:
        case "scripted/demo":
            return demo(at)
        case "scripted/echo":
            return Reply(at.asked, chunks=4)
        case "scripted/puppet":
            return puppet(at)
        case _:
            unknown = ModelRefused("There is no scripted model of this name.", model=request.model)
            return Reply(fault=unknown)


# scripted/demo

DEMO_SCRIPT = """\
i=1
while [ "$i" -le 5 ]; do
    echo "$i squared is $((i * i))"
    i=$((i + 1))
done > squares.txt
echo "wrote $(wc -l < squares.txt) lines to squares.txt"
"""
"""Plain sh: every sandbox has one."""
DEMO_PLAN = ("Write a script", "Run it", "Check its result")
DEMO_CHUNKS = 8
DEMO_DELAY_S = 0.02
"""Makes the stream visible to a person."""


def demo(at: Place) -> Reply:
    def say(text: str, *calls: tuple[str, dict[str, Any]]) -> Reply:
        return Reply(text, calls, chunks=DEMO_CHUNKS, delay_s=DEMO_DELAY_S)

    match at.step:
        case 0:
            return say("I will do this in three small steps.", demo_plan(n_done=0))
        case 1:
            written = {"path": "squares.sh", "content": DEMO_SCRIPT}
            return say("First the script.", ("write", written), demo_plan(n_done=1))
        case 2:
            return say("Now I run it.", ("bash", {"command": "sh squares.sh"}))
        case 3:
            read = ("read", {"path": "squares.txt"})
            return say("It ran. I check what it wrote.", read, demo_plan(n_done=len(DEMO_PLAN)))
        case _:
            return say(
                f"Done. You asked: {at.asked.strip()[:200]}\n\n"
                "I am a scripted model, so I did my usual task. The script said:\n"
                f"{at.results.get('bash', 'nothing').strip()}\n\nand squares.txt holds:\n"
                f"{at.results.get('read', 'nothing').strip()}"
            )


def demo_plan(*, n_done: int) -> tuple[str, dict[str, Any]]:
    states = ["completed"] * n_done + ["in_progress"] + ["pending"] * len(DEMO_PLAN)
    items = [
        {"id": str(n), "content": content, "status": status}
        for n, (content, status) in enumerate(zip(DEMO_PLAN, states, strict=False), start=1)
    ]
    return "plan", {"items": items}


# scripted/puppet


class PuppetCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    call: str
    args: dict[str, Any] | str = {}


class Step(BaseModel):
    """One model call of a puppet: `say`, then `call` or `calls`, then `fault` or `hang`."""

    model_config = ConfigDict(extra="forbid")
    say: str = ""
    chunks: int = Field(default=1, ge=1)
    delay_s: float = Field(default=0.0, ge=0, le=60)
    """Before each chunk."""
    call: str | None = None
    args: dict[str, Any] | str = {}
    calls: tuple[PuppetCall, ...] = ()
    fault: str | None = None
    """The code of a ModelFault."""
    hang: bool = False


STEPS: TypeAdapter[list[Step]] = TypeAdapter(list[Step])
FAULTS = {kind.code: kind for kind in (ModelFault, *ModelFault.__subclasses__())}


def puppet(at: Place) -> Reply:
    try:
        steps = STEPS.validate_python(yaml.safe_load(at.asked))
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none, too
        return Reply("That is not a puppet script: I need a YAML list of steps.")
    if at.step >= len(steps):
        return Reply("done")
    step = steps[at.step]
    if step.fault and step.fault not in FAULTS:
        return Reply(f"I know no fault {step.fault!r}, only {', '.join(sorted(FAULTS))}.")
    calls = (PuppetCall(call=step.call, args=step.args),) if step.call else step.calls
    return Reply(
        step.say,
        tuple((call.call, call.args) for call in calls),
        chunks=step.chunks,
        delay_s=step.delay_s,
        fault=FAULTS[step.fault]("The script says that this call fails.") if step.fault else None,
        hang=step.hang,
    )
