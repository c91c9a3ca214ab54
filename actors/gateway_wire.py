"""What crosses the network between a session's process and the model gateway: msgpack, which is data and
no code, in the bodies of gRPC calls.

A batch is a list of items, each a list that begins with its kind; an empty one says that the call lives. A
fault is the last item of its call, so gRPC's own statuses tell of the way and never of the model. What a
reader does not know, in a map or as a kind, it leaves out: sessions live on older code than a gateway
that was rolled. A change that such a reader would misunderstand takes the next VERSION, and a replica
goes on serving the one before.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgpack

from agent.events import ToolCall, Usage
from agent.faults import Fault, ModelFault
from agent.model.contract import Completion, ModelCard, ModelRequest, ReasoningChunk, TextChunk

VERSION = 1
SERVICE = f"troupe.gateway.v{VERSION}"
CHUNKS = "chunks"
CARD = "card"
TOKEN = "x-troupe-token"  # noqa: S105 - the name of the header, not what it holds
MAX_BODY_BYTES = 64 * 1024**2
"""Of a request with its whole conversation, and of a batch."""
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_send_message_length", MAX_BODY_BYTES),
    # A peer whose machine is gone sends no end: it is asked whether it lives while a call is open.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
"""Of both ends."""

Item = TextChunk | ReasoningChunk | Completion
Batch = tuple[Item, ...]


class Place(NamedTuple):
    """A replica, as it tells of itself."""

    replica_id: str
    app: str
    """Of Serve: several gateways may live beside each other."""
    address: str
    token: str
    """A secret of this replica's, without which it answers nobody."""
    node_id: str
    beat: int
    """Rises with each time that it tells."""
    n_calls: int
    versions: tuple[int, ...] = (VERSION,)


def place_of(told: dict[str, Any]) -> Place:
    """From a replica of another version, which may tell more."""
    return Place(**{name: told[name] for name in Place._fields if name in told})


def _packed(value: Any) -> bytes:
    # Half a surrogate pair, as a tool's output may hold, and numbers beyond 64 bits travel too.
    packed: Any = msgpack.packb(value, default=_number, unicode_errors="surrogatepass")
    return packed


def _number(value: Any) -> float:
    if isinstance(value, int):
        return float(value)
    raise TypeError(type(value).__name__)


def _unpacked(body: bytes) -> Any:
    return msgpack.unpackb(body, unicode_errors="surrogatepass")


def request_body(request: ModelRequest) -> bytes:
    return _packed(request._asdict())


def request_of(body: bytes) -> ModelRequest:
    told = _unpacked(body)
    return ModelRequest(**{name: told[name] for name in ModelRequest._fields if name in told})


def batch_body(items: Iterable[Item]) -> bytes:
    return _packed([_told(item) for item in items])


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


def batch_of(body: bytes) -> Batch:
    """
    Raises:
        ModelFault: what the call ended with.
    """
    items: list[Item] = []
    for kind, *rest in _unpacked(body):
        match kind:
            case "text":
                items.append(TextChunk(rest[0]))
            case "reasoning":
                items.append(ReasoningChunk(rest[0]))
            case "completion":
                items.append(_completion(rest[0]))
            case "fault":
                raise _fault(*rest[:3])
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


def card_body(card: ModelCard) -> bytes:
    return _packed([["card", *card]])


def card_of(body: bytes) -> ModelCard:
    """
    Raises:
        ModelFault: what the call ended with.
    """
    [[kind, *rest]] = _unpacked(body)
    if kind == "fault":
        raise _fault(*rest[:3])
    return ModelCard(*rest[: len(ModelCard._fields)])


def fault_body(fault: Fault) -> bytes:
    """Without its cause, which may hold words of the provider."""
    return _packed([["fault", fault.code, fault.detail, fault.fields]])


def _fault(code: str, detail: str, fields: dict[str, Any]) -> ModelFault:
    kind = next((kind for kind in ModelFault.__subclasses__() if kind.code == code), ModelFault)
    return kind(detail, **fields)
