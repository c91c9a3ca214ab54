"""`read`, `write`, `edit`: files of the workspace."""

import codecs
from typing import ClassVar

from pydantic import BaseModel, Field

from agent.faults import WorkspaceRefused
from agent.sandbox.contract import Sandbox
from agent.settings import ToolSettings
from agent.tools.arguments import Arguments
from agent.tools.contract import ToolResult, ToolScope

MAX_FILE_BYTES = 10 * 1024**2
"""Read or edited at once; what is larger is a case for `bash`."""
_MAX_LINE_CHARS = 2000
_SNIFFED_BYTES = 8192
_PATH = "Relative to the workspace, or absolute inside it."


class ReadArguments(Arguments):
    path: str = Field(description=_PATH)
    offset: int = Field(default=1, ge=1, description="The first line to show, counted from 1.")
    limit: int | None = Field(default=None, ge=1, description="How many lines to show at most.")


class WriteArguments(Arguments):
    path: str = Field(description=_PATH)
    content: str = Field(description="The whole new content.")


class EditArguments(Arguments):
    path: str = Field(description=_PATH)
    old: str = Field(
        min_length=1,
        description="The exact text to replace, without line numbers; it must occur once.",
    )
    new: str = Field(description="What comes in its place.")
    replace_all: bool = Field(default=False, description="Replace every occurrence.")


class Read:
    name: ClassVar[str] = "read"
    description: ClassVar[str] = (
        "Show a text file with numbered lines. `offset` and `limit` page through a long one."
    )
    Arguments: ClassVar[type[BaseModel]] = ReadArguments
    idempotent: ClassVar[bool] = True

    def __init__(self, settings: ToolSettings) -> None:
        self._settings = settings

    async def run(self, arguments: ReadArguments, scope: ToolScope) -> ToolResult:
        content = await _content(await scope.sandbox(), arguments.path)
        if isinstance(content, ToolResult):
            return content
        lines = content.split("\n")
        if lines[-1] == "":
            lines.pop()
        limit = min(arguments.limit or self._settings.read_max_lines, self._settings.read_max_lines)
        first = arguments.offset - 1
        if not lines:
            return ToolResult(f"{arguments.path} is empty.")
        if first >= len(lines):
            return _error(
                f"{arguments.path} has {len(lines)} lines; offset {arguments.offset} is past its end."
            )
        return ToolResult(self._page(lines, first, limit))

    def _page(self, lines: list[str], first: int, limit: int) -> str:
        """Numbered lines, within the limits for lines and for output."""
        shown: list[str] = []
        room = self._settings.max_output_bytes
        for number, line in enumerate(lines[first : first + limit], start=first + 1):
            text = line.removesuffix("\r")
            if len(text) > _MAX_LINE_CHARS:
                text = (
                    f"{text[:_MAX_LINE_CHARS]} [... {len(text) - _MAX_LINE_CHARS} more characters]"
                )
            numbered = f"{number:6}\t{text}"
            room -= len(numbered.encode()) + 1
            if room < 0 and shown:
                break
            shown.append(numbered)
        last = first + len(shown)
        if last < len(lines):
            shown.append(
                f"[lines {first + 1} to {last} of {len(lines)}; go on with offset {last + 1}]"
            )
        return "\n".join(shown)


class Write:
    name: ClassVar[str] = "write"
    description: ClassVar[str] = (
        "Write a file: make it, or replace its whole content. Missing directories are made."
    )
    Arguments: ClassVar[type[BaseModel]] = WriteArguments
    idempotent: ClassVar[bool] = False

    async def run(self, arguments: WriteArguments, scope: ToolScope) -> ToolResult:
        sandbox = await scope.sandbox()
        content = arguments.content.encode(errors="replace")
        try:
            await sandbox.write_file(arguments.path, content)
        except (WorkspaceRefused, IsADirectoryError) as refusal:
            return _refused(arguments.path, refusal)
        n_lines = arguments.content.count("\n") + (
            not arguments.content.endswith("\n") and content != b""
        )
        return ToolResult(f"Wrote {len(content)} bytes, {n_lines} lines, to {arguments.path}.")


class Edit:
    name: ClassVar[str] = "edit"
    description: ClassVar[str] = (
        "Replace an exact text in a file. It must occur exactly once, so give enough of what stands "
        "around it, or set `replace_all`."
    )
    Arguments: ClassVar[type[BaseModel]] = EditArguments
    idempotent: ClassVar[bool] = False

    async def run(self, arguments: EditArguments, scope: ToolScope) -> ToolResult:
        sandbox = await scope.sandbox()
        content = await _content(sandbox, arguments.path)
        if isinstance(content, ToolResult):
            return content
        if arguments.old == arguments.new:
            return _error("`old` and `new` are the same; nothing was changed.")
        places = _places(content, arguments.old)
        if not places:
            return _error(_not_found(arguments, content))
        if len(places) > 1 and not arguments.replace_all:
            lines = ", ".join(str(content.count("\n", 0, place) + 1) for place in places[:10])
            return _error(
                f"`old` occurs {len(places)} times in {arguments.path} (lines {lines}"
                f"{', ...' if len(places) > 10 else ''}); nothing was changed. Give more of the text "
                "around the one that is meant, or set replace_all."
            )
        changed = content.replace(arguments.old, arguments.new)
        try:
            await sandbox.write_file(arguments.path, changed.encode(errors="replace"))
        except (WorkspaceRefused, IsADirectoryError) as refusal:
            return _refused(arguments.path, refusal)
        times = "once" if len(places) == 1 else f"{len(places)} times"
        return ToolResult(
            f"Replaced {times} in {arguments.path}, from line {content.count(chr(10), 0, places[0]) + 1} on."
        )


def _places(content: str, old: str) -> list[int]:
    """Where `str.replace` would replace."""
    found: list[int] = []
    at = content.find(old)
    while at >= 0:
        found.append(at)
        at = content.find(old, at + len(old))
    return found


def _not_found(arguments: EditArguments, content: str) -> str:
    text = f"`old` does not occur in {arguments.path}; nothing was changed."
    if "\r\n" in content and "\r" not in arguments.old and "\n" in arguments.old:
        return f"{text} The file has CRLF line ends: write them as \\r\\n."
    if " ".join(arguments.old.split()) in " ".join(content.split()):
        return f"{text} It differs only in spaces or line breaks: read the file again and copy exactly."
    return f"{text} Read the file again: it may have changed."


async def _content(sandbox: Sandbox, path: str) -> str | ToolResult:
    """A file's text, or the result that says why there is none."""
    try:
        content = await sandbox.read_file(path, max_bytes=MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return _error(f"{path}: there is no such file.")
    except (WorkspaceRefused, IsADirectoryError) as refusal:
        return _refused(path, refusal)
    if len(content) > MAX_FILE_BYTES:
        return _error(
            f"{path} has more than {MAX_FILE_BYTES} bytes; use bash (head, tail, sed, grep)."
        )
    if b"\0" in content[:_SNIFFED_BYTES]:
        return _error(f"{path} is a binary file; use bash (file, xxd, strings) to look into it.")
    try:
        return codecs.decode(content, "utf-8")
    except UnicodeDecodeError as problem:
        return _error(
            f"{path} is not UTF-8 text (byte {problem.start}); use bash to look into or convert it."
        )


def _refused(path: str, refusal: WorkspaceRefused | IsADirectoryError) -> ToolResult:
    if isinstance(refusal, WorkspaceRefused):
        return _error(refusal.detail)
    return _error(f"{path} is a directory; use bash (ls) to list it.")


def _error(text: str) -> ToolResult:
    return ToolResult(text, "error")
