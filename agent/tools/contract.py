"""The contract of a tool.

Tool authors raise plain Python exceptions: the router turns one that escapes into the call's `error`
result, and nothing else happens.
"""

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic import BaseModel

from agent.events import Fact, Outcome
from agent.sandbox.contract import Sandbox


class ToolResult(NamedTuple):
    text: str
    """What the model is told."""
    outcome: Outcome = "ok"
    facts: tuple[Fact, ...] = ()
    """Committed together with ToolFinished, before it (`PlanUpdated`)."""


class ToolScope(NamedTuple):
    """What a running call may use."""

    session_id: str
    sandbox: Callable[[], Awaitable[Sandbox]]
    """Opens the session's sandbox at the first use; raises SandboxUnavailable."""
    show: Callable[[str], None]
    """Preview output as it appears: shown to readers, not stored, not told to the model."""
    user_token: str | None = None
    """The user's own token for tools (X-HF-Token). Never into a result: results are kept in plain text."""


class Tool(Protocol):
    name: ClassVar[str]
    description: ClassVar[str]
    """For the model."""
    Arguments: ClassVar[type[BaseModel]]
    """`extra="forbid"`; its JSON schema is what the model sees, so fields carry descriptions."""
    idempotent: ClassVar[bool]
    """After a crash a call that had started runs again instead of being settled `unknown`."""

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        """`arguments` is a validated instance of `Arguments`."""
        ...


class Tools(Protocol):
    """What the loop sees: the router."""

    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI function tools, in a stable order. The same list at every call: not to be changed."""
        ...

    def idempotent(self, tool: str) -> bool:
        """False for a tool that nobody knows."""
        ...

    async def run(self, tool: str, arguments: str, scope: ToolScope) -> ToolResult:
        """Run a call. An unknown tool, arguments that do not parse or do not fit, and an exception of
        the tool are `error` results with a text that helps the model. Only cancellation escapes."""
        ...
