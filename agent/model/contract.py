"""The contract between the loop and any language model."""

from collections.abc import AsyncGenerator
from typing import Any, Literal, NamedTuple, Protocol

from agent.events import ToolCall, Usage


class ModelRequest(NamedTuple):
    model: str
    """A litellm name, or `scripted/...`."""
    messages: list[dict[str, Any]]
    """OpenAI chat format, system message first; every tool call has its result."""
    tools: list[dict[str, Any]] = []
    """OpenAI function tools: `{"type": "function", "function": {name, description, parameters}}`."""
    session_id: str = ""
    """For affinity and fairness; never for identity."""
    kind: Literal["main", "compaction", "seed"] = "main"
    max_output_tokens: int | None = None
    temperature: float | None = None
    stream: bool = True
    """False: nobody watches. The provider may then answer in one piece: at most one ReasoningChunk and
    one TextChunk, and the Completion."""


class TextChunk(NamedTuple):
    """The next characters of the answer. Never empty."""

    text: str


class ReasoningChunk(NamedTuple):
    text: str


class Completion(NamedTuple):
    """The whole answer: the last item of every stream that did not fail."""

    text: str
    """All TextChunks joined."""
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    """`stop`, `length`, `tool_calls`, `content_filter`, ..."""
    usage: Usage | None
    cost_usd: float | None
    """None: unpriced, or no usage was reported. Never 0 for "unknown"."""
    reasoning: str = ""
    n_retries: int = 0


class ModelCard(NamedTuple):
    window_tokens: int
    """Input and output together, as the provider counts."""
    priced: bool


class Model(Protocol):
    def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator["TextChunk | ReasoningChunk | Completion"]:
        """Ask once; yield chunks as they come, then exactly one Completion.

        Closing the generator early, or cancelling it, ends the provider's request at once. Tool call
        ids are unique within the answer and never empty. Limits of time are the adapter's: to the
        first chunk, between chunks, and whole.

        Raises:
            ModelFault: one of its subclasses. Nothing was completed; chunks that were yielded
                before are void. A stream that ends without the provider's end mark is ModelCut.
        """
        ...

    async def card(self, model: str) -> ModelCard:
        """Facts about a model; a documented default for a model that nobody knows."""
        ...
