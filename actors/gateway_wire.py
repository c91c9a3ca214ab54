"""What crosses the data plane (`actors.plane`) between a session's process and the model gateway.

A batch is a list of items, each a list that begins with its kind; an empty one says that the call lives.
What a reader does not know, in a map or as a kind, it leaves out: sessions live on older code than a
gateway that was rolled. A change that such a reader would misunderstand takes the next VERSION, and a
replica goes on serving the one before.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from actors.plane import PlaneAddress
from agent.events import ToolCall, Usage
from agent.model.contract import Completion, ModelCard, ModelRequest, ReasoningChunk, TextChunk

VERSION = 1
CHUNKS = f"chunks.{VERSION}"
CARD = f"card.{VERSION}"

Item = TextChunk | ReasoningChunk | Completion
Batch = tuple[Item, ...]


class Place(NamedTuple):
    """A replica, as it tells of itself."""

    replica_id: str
    app: str
    """Of Serve: several gateways may live beside each other."""
    address: PlaneAddress
    node_id: str
    beat: int
    """Rises with each time that it tells."""
    n_calls: int
    versions: tuple[int, ...] = (VERSION,)


def place_of(told: dict[str, Any]) -> Place:
    """From a replica of another version, which may tell more."""
    return Place(**{name: told[name] for name in Place._fields if name in told})


def request_of(told: dict[str, Any]) -> ModelRequest:
    return ModelRequest(**{name: told[name] for name in ModelRequest._fields if name in told})


def told_batch(items: Iterable[Item]) -> list[Any]:
    return [_told(item) for item in items]


def _told(item: Item) -> list[Any]:
    match item:
        case TextChunk(text):
            return ["text", text]
        case ReasoningChunk(text):
            return ["reasoning", text]
        case Completion():
            usage = item.usage.model_dump() if item.usage else None
            calls = [call.model_dump() for call in item.tool_calls]
            return ["completion", item._asdict() | {"usage": usage, "tool_calls": calls}]


def batch_of(told: list[Any]) -> Batch:
    items: list[Item] = []
    for kind, *rest in told:
        match kind:
            case "text":
                items.append(TextChunk(rest[0]))
            case "reasoning":
                items.append(ReasoningChunk(rest[0]))
            case "completion":
                items.append(_completion(rest[0]))
            case _:
                pass
    return tuple(items)


def _completion(told: dict[str, Any]) -> Completion:
    known = {name: told[name] for name in Completion._fields if name in told}
    known["tool_calls"] = tuple(_known(ToolCall, call) for call in told["tool_calls"])
    known["usage"] = told["usage"] and _known(Usage, told["usage"])
    return Completion(**known)


def _known(kind: type[Any], told: dict[str, Any]) -> Any:
    return kind(**{name: value for name, value in told.items() if name in kind.model_fields})


def card_of(told: list[Any]) -> ModelCard:
    return ModelCard(*told[: len(ModelCard._fields)])
