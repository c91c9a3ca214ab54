"""What the activations of one process share, handed down by whoever assembles the process."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from actors.pace import Pace
from actors.settings import ActorsSettings
from agent.journal import Journal, utc_now
from agent.model.contract import Model
from agent.sandbox.contract import Sandbox
from agent.sandbox.local import open_sandbox
from agent.settings import AgentSettings, ToolSettings
from agent.snapshots import Snapshots
from agent.spec import AgentSpec, SandboxSpec
from agent.tools.contract import Tool, Tools
from agent.tools.router import ToolRouter
from agent.tools.standard import standard_tools

PAGE_COST_S = 0.0005
"""CPU of a page on its way to a reader, in the session's process, the edge and what lies between, with a
core for it: measured on the machine of docs/performance.md."""


class OpenSandbox(Protocol):
    async def __call__(
        self, spec: SandboxSpec, workspace: Path, *, session_id: str, epoch: int
    ) -> Sandbox: ...


@dataclass(frozen=True)
class Kit:
    journal: Journal
    model: Model
    agent: AgentSettings
    actors: ActorsSettings
    snapshots: Snapshots | None = None
    open_sandbox: OpenSandbox = open_sandbox
    make_tools: Callable[[ToolSettings], Sequence[Tool]] = standard_tools
    now_s: Callable[[], float] = time.monotonic
    utc_now: Callable[[], datetime] = utc_now
    reading: Pace = field(default_factory=lambda: Pace(PAGE_COST_S, time.monotonic))
    """Of the readers of all sessions here."""

    def tools(self, spec: AgentSpec) -> Tools:
        """The tools that an agent may call; one router per session."""
        made = self.make_tools(self.agent.tools)
        return ToolRouter(made, spec.tools, max_tool_s=self.agent.tools.max_tool_s)

    def workspace(self, session_id: str) -> Path:
        return self.agent.storage_dir / "workspaces" / session_id

    def trajectory_path(self, session_id: str) -> Path:
        return self.agent.storage_dir / "trajectories" / f"{session_id}.json"

    async def forget_snapshots(self, session_id: str) -> None:
        """
        Raises:
            SnapshotFailed
        """
        if self.snapshots is not None:
            await self.snapshots.forget(session_id, self.workspace(session_id))

    def remove_files(self, session_id: str) -> None:
        """Delete a session's workspace and trajectory. Blocking. Absent files are fine."""
        shutil.rmtree(self.workspace(session_id), ignore_errors=True)
        self.trajectory_path(session_id).unlink(missing_ok=True)
