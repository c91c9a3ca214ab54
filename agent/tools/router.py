"""The router: names to tools, JSON to arguments, exceptions to results."""

import asyncio
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import structlog
from pydantic import ValidationError

from agent.tools.contract import Tool, ToolResult, ToolScope

log = structlog.get_logger(__name__)

MAX_RESULT_CHARS = 100_000
"""Of one result: a tool that forgot to bound itself must not fill the model's window."""
_MAX_PROBLEMS = 8
_MAX_ERROR_CHARS = 2000


class ToolRouter:
    """The tools whose names match one of the globs `allowed`, in the order they were given. A call
    that takes longer than `max_tool_s` is cancelled."""

    def __init__(
        self, tools: Iterable[Tool], allowed: tuple[str, ...], *, max_tool_s: float = math.inf
    ) -> None:
        self._max_tool_s = max_tool_s
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise ValueError(f"two tools are named {tool.name}")
            if any(fnmatchcase(tool.name, glob) for glob in allowed):
                self._tools[tool.name] = tool

    def schemas(self) -> list[dict[str, Any]]:
        return self._schemas

    @cached_property
    def _schemas(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.Arguments.model_json_schema(),
                },
            }
            for tool in self._tools.values()
        ]

    def idempotent(self, tool: str) -> bool:
        found = self._tools.get(tool)
        return found is not None and found.idempotent

    async def run(self, tool: str, arguments: str, scope: ToolScope) -> ToolResult:
        found = self._tools.get(tool)
        if found is None:
            known = ", ".join(self._tools) or "none"
            return ToolResult(f"There is no tool named {tool[:100]!r}. Tools: {known}.", "error")
        try:
            # A call without arguments often comes as an empty text.
            parsed = found.Arguments.model_validate_json(arguments.strip() or "{}")
        except ValidationError as problem:
            return ToolResult(_explained(found, problem), "error")
        limit = asyncio.timeout(self._max_tool_s)
        try:
            async with limit:
                result = await found.run(parsed, scope)
        except Exception as cause:  # the contract: whatever a tool raises is this call's result
            if limit.expired():
                log.warning("tool_stopped", tool=tool, limit_s=self._max_tool_s)
                return ToolResult(_stopped(self._max_tool_s), "error")
            log.warning("tool_raised", tool=tool, exc_info=True)
            said = str(cause).strip()[:_MAX_ERROR_CHARS]
            return ToolResult(
                f"{type(cause).__name__}: {said}" if said else type(cause).__name__, "error"
            )
        return result._replace(text=_bounded(result.text))


def _stopped(limit_s: float) -> str:
    return (
        f"Stopped after {limit_s:g} s, which is the limit for any call. What it did until then may "
        "have had effects: look before you repeat it."
    )


def _explained(tool: Tool, problem: ValidationError) -> str:
    """What was wrong with the arguments, and what they should have been."""
    lines = [f"The arguments of {tool.name} do not fit; nothing was run."]
    errors = problem.errors(include_url=False, include_context=False)
    for error in errors[:_MAX_PROBLEMS]:
        where = ".".join(str(part)[:100] for part in error["loc"]) or "arguments"
        lines.append(f"- {where}: {error['msg'][:300]}")
    if len(errors) > _MAX_PROBLEMS:
        lines.append(f"- and {len(errors) - _MAX_PROBLEMS} more")
    lines.append("Expected: a JSON object with " + ", ".join(_fields(tool)) + ".")
    return "\n".join(lines)


def _fields(tool: Tool) -> list[str]:
    schema = tool.Arguments.model_json_schema()
    required: list[str] = schema.get("required", [])
    properties: dict[str, dict[str, Any]] = schema.get("properties", {})
    return [
        f"`{name}` ({_type_name(field)}{', required' if name in required else ''})"
        for name, field in properties.items()
    ]


def _type_name(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(str(one.get("type", "value")) for one in field["anyOf"])
    return str(field.get("type", "value"))


def _bounded(text: str) -> str:
    if len(text) <= MAX_RESULT_CHARS:
        return text
    half = MAX_RESULT_CHARS // 2
    missing = len(text) - 2 * half
    return f"{text[:half]}\n[... {missing} characters are missing here ...]\n{text[-half:]}"
