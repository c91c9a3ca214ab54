"""What an agent is: frozen values, snapshotted into the session's first fact."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Action = Literal["allow", "ask", "deny"]


class ArgumentPredicate(Part):
    """Holds when the argument at `path` is there and satisfies every condition that is given."""

    path: str
    """Dotted, from the root of the call's arguments: `command`, `options.force`."""
    equals: Any = None
    """None: no condition."""
    matches: str | None = None
    """A regular expression searched in the argument's text (JSON for non-strings)."""


class ApprovalRule(Part):
    tools: str
    """Glob over tool names."""
    when: tuple[ArgumentPredicate, ...] = ()
    """All must hold; none: the rule holds for every call. A call whose arguments do not parse
    satisfies every predicate, so a rule that asks or denies cannot be passed by garbage."""
    action: Action
    reason: str = ""
    """Shown to the person who is asked, or to the model that is denied."""


class ApprovalPolicy(Part):
    """The gate in front of every tool call: the first rule that holds decides."""

    rules: tuple[ApprovalRule, ...] = ()
    default: Action = "allow"


class Limits(Part):
    """Reaching one ends the turn with `TurnEnded("limit")`."""

    max_steps: int = Field(default=300, ge=1)
    """Model calls per turn."""
    max_turn_s: float = Field(default=7200.0, gt=0)
    """Wall time of a turn, counted per incarnation."""


class SandboxSpec(Part):
    kind: Literal["auto", "bwrap", "sandlock", "process"] = "auto"
    """`auto`: bwrap where it is installed, else sandlock. `process` has no isolation at all."""
    network: bool = False
    memory_bytes: int = Field(default=2 * 1024**3, ge=64 * 1024**2)
    max_processes: int = Field(default=256, ge=8)
    max_file_bytes: int = Field(default=1024**3, ge=1024**2)
    tmp_bytes: int = Field(default=512 * 1024**2, ge=1024**2)


class Compaction(Part):
    at_fraction: float = Field(default=0.9, gt=0, le=1)
    """Of the model's window: a prompt above it is compacted before the next model call."""
    keep_fraction: float = Field(default=0.25, ge=0, lt=1)
    """Of the window: about how much of the newest conversation stays as it was."""


class AgentSpec(Part):
    name: str
    system_prompt: str
    model: str
    """The default; a session may be opened with, or switched to, another."""
    tools: tuple[str, ...] = ("bash", "read", "write", "edit", "plan")
    """Names, or globs over the names that the router knows."""
    limits: Limits = Limits()
    approval: ApprovalPolicy = ApprovalPolicy()
    sandbox: SandboxSpec = SandboxSpec()
    compaction: Compaction = Compaction()
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Per model call. None: the provider's default."""
    temperature: float | None = Field(default=None, ge=0, le=2)
