"""What can be owed to a session. `Context.owed` returns one of these; `agent.loop.advance` has a case for
each, and nothing else moves a session."""

from typing import NamedTuple

from agent.events import Ask, EndReason, SeedRequested, ToolFinished


class Rest(NamedTuple):
    """Nothing, until the next command."""


class CallModel(NamedTuple):
    pass


class Due(NamedTuple):
    """A tool call that may run, with the arguments that run."""

    tool_call_id: str
    tool: str
    arguments: str


class RunTools(NamedTuple):
    calls: tuple[Due, ...]


class Settle(NamedTuple):
    """Calls that end without running (again)."""

    results: tuple[ToolFinished, ...]


class RequestApproval(NamedTuple):
    asks: tuple[Ask, ...]


class Compact(NamedTuple):
    upto: int
    """The seq of the last entry to be summarised."""


class Summarise(NamedTuple):
    seed: SeedRequested


class End(NamedTuple):
    reason: EndReason
    code: str | None = None
    detail: str | None = None


Owed = Rest | CallModel | RunTools | Settle | RequestApproval | Compact | Summarise | End
