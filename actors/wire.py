"""What processes of the house tell each other on sockets of their own: msgpack, which is data and no code."""

from collections.abc import Iterable
from typing import Any, TypeVar

import msgpack

from agent.faults import Fault

F = TypeVar("F", bound=Fault)


def packed(value: Any) -> bytes:
    # Half a surrogate pair, as a tool's output may hold, and numbers beyond 64 bits travel too.
    body: Any = msgpack.packb(value, default=_number, unicode_errors="surrogatepass")
    return body


def _number(value: Any) -> float:
    if isinstance(value, int):
        return float(value)
    raise TypeError(type(value).__name__)


def unpacked(body: bytes) -> Any:
    """
    Raises:
        ValueError: it is no msgpack.
    """
    try:
        return msgpack.unpackb(body, unicode_errors="surrogatepass")
    except msgpack.UnpackException as cause:
        raise ValueError("no msgpack") from cause


def told(fault: Fault) -> list[Any]:
    """Without its cause, which may hold a provider's words."""
    return [type(fault).__name__, fault.detail, fault.fields]


def fault_of(told: Iterable[Any], otherwise: type[Fault]) -> Fault:
    """The fault that was told; one of a class that is not known here is an `otherwise`."""
    name, detail, fields, *_ = told
    kind = next((kind for kind in _kinds(Fault) if kind.__name__ == name), otherwise)
    return kind(detail, **fields)


def _kinds(root: type[Fault]) -> Iterable[type[Fault]]:
    for kind in root.__subclasses__():
        yield kind
        yield from _kinds(kind)
