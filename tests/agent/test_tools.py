"""The standard tools through the router, as the loop calls them."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from agent.events import PlanItem, PlanUpdated
from agent.faults import SandboxUnavailable
from agent.sandbox.contract import ExecResult, Sandbox
from agent.sandbox.local import open_sandbox
from agent.settings import ToolSettings
from agent.spec import SandboxSpec
from agent.testing import FakeSandbox
from agent.tools.arguments import Arguments
from agent.tools.contract import Tool, ToolResult, ToolScope
from agent.tools.files import MAX_FILE_BYTES
from agent.tools.router import MAX_RESULT_CHARS, ToolRouter
from agent.tools.standard import standard_tools

SETTINGS = ToolSettings()


class Echo:
    """A tool whose behaviour a test chooses."""

    name: ClassVar[str] = "echo"
    description: ClassVar[str] = "Says it again."

    class Arguments(Arguments):
        text: str
        times: int = 1

    idempotent: ClassVar[bool] = True

    def __init__(self, act: Callable[[str], str] = lambda text: text) -> None:
        self._act = act

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        return ToolResult(self._act(arguments.text) * arguments.times)


def scope(
    sandbox: Sandbox | None = None, show: Callable[[str], None] = lambda _text: None
) -> ToolScope:
    async def opened() -> Sandbox:
        if sandbox is None:
            raise SandboxUnavailable("No sandbox here.")
        return sandbox

    return ToolScope("s1", opened, show)


def router(settings: ToolSettings = SETTINGS, *more: Tool) -> ToolRouter:
    return ToolRouter([*standard_tools(settings), *more], ("*",))


Call = Callable[..., Awaitable[ToolResult]]


@pytest.fixture
def fake(tmp_path: Path) -> FakeSandbox:
    return FakeSandbox(tmp_path)


@pytest.fixture
def call(fake: FakeSandbox) -> Call:
    async def run(tool: str, **arguments: Any) -> ToolResult:
        return await router().run(tool, json.dumps(arguments), scope(fake))

    return run


@pytest.fixture
async def real(tmp_path: Path) -> AsyncGenerator[Sandbox]:
    sandbox = await open_sandbox(SandboxSpec(), tmp_path / "real", session_id="tools")
    yield sandbox
    await sandbox.close()


# --- the router ----------------------------------------------------------------------------------


def test_schemas_are_openai_functions_of_the_allowed_tools_in_their_order() -> None:
    names = [schema["function"]["name"] for schema in router().schemas()]
    assert names == ["bash", "read", "write", "edit", "plan"]
    for schema in router().schemas():
        function = schema["function"]
        Draft202012Validator.check_schema(function["parameters"])
        assert schema["type"] == "function"
        assert function["description"]
        assert function["parameters"]["additionalProperties"] is False
    some = ToolRouter(standard_tools(SETTINGS), ("re*", "plan"))
    assert [schema["function"]["name"] for schema in some.schemas()] == ["read", "plan"]


def test_the_model_is_told_the_limits_of_bash() -> None:
    settings = ToolSettings(bash_timeout_s=7, bash_max_timeout_s=77)
    field = router(settings).schemas()[0]["function"]["parameters"]["properties"]["timeout_s"]
    assert "7 if not given, at most 77" in field["description"]


def test_only_what_may_run_twice_is_idempotent() -> None:
    found = {
        name: router().idempotent(name)
        for name in ("bash", "read", "write", "edit", "plan", "none")
    }
    assert found == {
        "bash": False,
        "read": True,
        "write": False,
        "edit": False,
        "plan": True,
        "none": False,
    }


async def test_a_tool_that_is_not_there_or_not_allowed_is_an_error_that_names_the_others() -> None:
    tools = ToolRouter(standard_tools(SETTINGS), ("read", "plan"))
    for name in ("bash", "rm"):
        result = await tools.run(name, '{"command": "true"}', scope())
        assert result.outcome == "error"
        assert "read, plan" in result.text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "text: Field required"),
        ("", "text: Field required"),
        ('{"text": 1}', "text: Input should be a valid string"),
        ('{"text": "a", "tmies": 2}', "tmies: Extra inputs are not permitted"),
        ('{"text": "a", "times": "many"}', "times: Input should be a valid integer"),
    ],
)
async def test_arguments_that_do_not_fit_say_what_is_wrong_and_what_is_expected(
    arguments: str, expected: str
) -> None:
    result = await router(SETTINGS, Echo()).run("echo", arguments, scope())
    assert result.outcome == "error"
    assert expected in result.text
    assert "`text` (string, required), `times` (integer)" in result.text


async def test_an_exception_of_a_tool_is_that_calls_error_without_a_traceback() -> None:
    def fail(text: str) -> str:
        raise LookupError(text)

    result = await router(SETTINGS, Echo(fail)).run("echo", '{"text": "no such star"}', scope())
    assert result == ToolResult("LookupError: no such star", "error")


async def test_cancellation_escapes() -> None:
    def cancel(_text: str) -> str:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await router(SETTINGS, Echo(cancel)).run("echo", '{"text": ""}', scope())


async def test_a_result_is_bounded() -> None:
    arguments = json.dumps({"text": "a" * 1000, "times": 1000})
    result = await router(SETTINGS, Echo()).run("echo", arguments, scope())
    assert len(result.text) < MAX_RESULT_CHARS + 100
    assert "900000 characters are missing" in result.text


async def test_a_sandbox_that_cannot_be_opened_is_an_error_result() -> None:
    result = await router().run("bash", '{"command": "true"}', scope())
    assert (result.outcome, "No sandbox here." in result.text) == ("error", True)


class Endless(Echo):
    """Works until it is stopped, and says that it was."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = asyncio.Event()

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()
        raise AssertionError


async def test_a_call_that_does_not_end_is_stopped_at_the_limit_of_any_call() -> None:
    endless = Endless()
    tools = ToolRouter([endless], ("*",), max_tool_s=0.05)
    result = await tools.run("echo", '{"text": ""}', scope())
    assert result.outcome == "error"
    assert "0.05 s" in result.text
    assert endless.stopped.is_set()


async def test_a_tools_own_timeout_is_its_own_error() -> None:
    def late(_text: str) -> str:
        raise TimeoutError("the other side slept")

    tools = ToolRouter([Echo(late)], ("*",), max_tool_s=5)
    result = await tools.run("echo", '{"text": ""}', scope())
    assert result == ToolResult("TimeoutError: the other side slept", "error")


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="echo"):
        ToolRouter([Echo(), Echo()], ("*",))


def test_arguments_of_every_tool_are_closed() -> None:
    for tool in standard_tools(SETTINGS):
        arguments: type[BaseModel] = tool.Arguments
        assert arguments.model_config.get("extra") == "forbid"


# --- bash ----------------------------------------------------------------------------------------


async def test_bash_tells_output_and_exit_code_and_shows_it_live(tmp_path: Path) -> None:
    sandbox = FakeSandbox(tmp_path, {"make": ExecResult(2, "broken")})
    shown: list[str] = []
    result = await router().run("bash", '{"command": "make"}', scope(sandbox, shown.append))
    assert result == ToolResult("broken\n[exit code 2]", "error")
    assert shown == ["broken"]


async def test_bash_refuses_a_timeout_over_the_limit(call: Call, fake: FakeSandbox) -> None:
    for timeout_s in (1201, 0, -1):
        assert (await call("bash", command="true", timeout_s=timeout_s)).outcome == "error"
    assert fake.commands == []


async def test_bash_works_in_a_real_sandbox(real: Sandbox) -> None:
    settings = ToolSettings(max_output_bytes=1000)
    shown: list[str] = []
    here = scope(real, shown.append)

    async def bash(command: str, **more: Any) -> ToolResult:
        return await router(settings).run("bash", json.dumps({"command": command, **more}), here)

    assert (await bash("mkdir d && cd d && pwd")).text == f"{real.workspace_path}/d\n[exit code 0]"
    long = await bash("seq 5000")
    assert long.outcome == "ok"
    assert long.text.startswith("1\n2\n")
    path = long.text.partition("full text is in ")[2].split()[0]
    page = await router(settings).run("read", json.dumps({"path": path, "offset": 4990}), here)
    assert page.text.splitlines()[0] == "  4990\t4990"
    assert "".join(shown).startswith(f"{real.workspace_path}/d\n1\n2\n")
    late = await bash("echo begun; sleep 600", timeout_s=0.5)
    assert late.outcome == "error"
    assert late.text.startswith("begun\n[killed after 0.5 s")


# --- read ----------------------------------------------------------------------------------------


async def test_read_numbers_lines_and_pages(call: Call, fake: FakeSandbox) -> None:
    await fake.write_file("f", "".join(f"line {i}\n" for i in range(1, 11)).encode())
    assert (await call("read", path="f", offset=3, limit=2)).text == (
        "     3\tline 3\n     4\tline 4\n[lines 3 to 4 of 10; go on with offset 5]"
    )
    assert (await call("read", path="f", offset=10)).text == "    10\tline 10"
    past = await call("read", path="f", offset=11)
    assert (past.outcome, "10 lines" in past.text) == ("error", True)


async def test_read_stays_within_lines_and_bytes(fake: FakeSandbox) -> None:
    await fake.write_file("long", b"x" * 5000 + b"\nshort\n")
    await fake.write_file("many", b"y" * 90 + b"\n" * 3000)
    settings = ToolSettings(max_output_bytes=2500, read_max_lines=50)
    tools = router(settings)
    text = (await tools.run("read", '{"path": "long"}', scope(fake))).text
    assert "[... 3000 more characters]" in text
    assert "     2\tshort" in text
    for limit in ({}, {"limit": 1000}):
        text = (await tools.run("read", json.dumps({"path": "many", **limit}), scope(fake))).text
        assert text.endswith("[lines 1 to 50 of 3000; go on with offset 51]")


async def test_read_says_what_cannot_be_shown(
    call: Call, fake: FakeSandbox, tmp_path: Path
) -> None:
    await fake.write_file("empty", b"")
    await fake.write_file("image", b"\x89PNG\0\0")
    await fake.write_file("latin", "häßlich".encode("latin-1"))
    await fake.write_file("dir/file", b"")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(MAX_FILE_BYTES + 1)
    said = {
        "empty": "empty is empty", "image": "binary", "latin": "not UTF-8", "dir": "is a directory",
        "none": "no such file", "huge": "more than", "../out": "workspace", "/etc/passwd": "outside the workspace",
    }  # fmt: skip
    for path, words in said.items():
        result = await call("read", path=path)
        assert words in result.text, path
        assert result.outcome == ("ok" if path == "empty" else "error")


# --- write and edit ------------------------------------------------------------------------------


async def test_write_makes_directories_and_replaces(call: Call, fake: FakeSandbox) -> None:
    result = await call("write", path="a/b", content="one\ntwo")
    assert result == ToolResult("Wrote 7 bytes, 2 lines, to a/b.")
    await call("write", path="a/b", content="é")
    assert await fake.read_file("a/b", max_bytes=10) == "é".encode()
    for path in ("a", "../x", "/etc/x"):
        assert (await call("write", path=path, content="")).outcome == "error"


async def test_edit_replaces_one_exact_text(call: Call, fake: FakeSandbox) -> None:
    await fake.write_file("f", b"one\ntwo\nthree\n")
    result = await call("edit", path="f", old="two\n", new="2\n")
    assert result == ToolResult("Replaced once in f, from line 2 on.")
    assert await fake.read_file("f", max_bytes=100) == b"one\n2\nthree\n"


async def test_edit_on_none_or_several_matches_changes_nothing_and_helps(
    call: Call, fake: FakeSandbox
) -> None:
    content = b"x = 1\ny = 1\nx = 1\n    deep\n"
    await fake.write_file("f", content)
    several = await call("edit", path="f", old="x = 1", new="x = 2")
    assert several.outcome == "error"
    assert "2 times in f (lines 1, 3)" in several.text
    assert "replace_all" in several.text
    assert "does not occur" in (await call("edit", path="f", old="z", new="")).text
    assert "only in spaces" in (await call("edit", path="f", old="y = 1 x", new="")).text
    assert "same" in (await call("edit", path="f", old="y = 1", new="y = 1")).text
    assert (await call("edit", path="none", old="a", new="b")).outcome == "error"
    assert (await call("edit", path="f", old="", new="b")).outcome == "error"
    assert await fake.read_file("f", max_bytes=100) == content
    every = await call("edit", path="f", old="x = 1", new="x = 2", replace_all=True)
    assert every.text.startswith("Replaced 2 times")
    assert (await fake.read_file("f", max_bytes=100)).count(b"x = 2") == 2


async def test_edit_keeps_line_ends_and_says_when_they_are_why(
    call: Call, fake: FakeSandbox
) -> None:
    await fake.write_file("f", b"one\r\ntwo\r\n")
    assert "CRLF" in (await call("edit", path="f", old="one\ntwo", new="x")).text
    await call("edit", path="f", old="two", new="2")
    assert await fake.read_file("f", max_bytes=100) == b"one\r\n2\r\n"


async def test_files_and_shell_see_the_same_in_a_real_sandbox(real: Sandbox) -> None:
    async def run(tool: str, **arguments: Any) -> ToolResult:
        return await router().run(tool, json.dumps(arguments), scope(real))

    await run("write", path="run.sh", content="#!/bin/bash\necho one\n")
    await run("bash", command="chmod +x run.sh")
    await run("edit", path=f"{real.workspace_path}/run.sh", old="one", new="two")
    assert (await run("bash", command="./run.sh")).text == "two\n[exit code 0]"
    assert (await run("read", path="run.sh")).text == "     1\t#!/bin/bash\n     2\techo two"


# --- plan ----------------------------------------------------------------------------------------


async def test_plan_replaces_the_list_with_a_fact(call: Call) -> None:
    result = await call(
        "plan",
        items=[
            {"id": "1", "content": "look", "status": "completed"},
            {"id": "2", "content": "act"},
        ],
    )
    items = (PlanItem(id="1", content="look", status="completed"), PlanItem(id="2", content="act"))
    assert result == ToolResult("[x] 1: look\n[ ] 2: act", facts=(PlanUpdated(items=items),))
    assert (await call("plan", items=[])).facts == (PlanUpdated(items=()),)


async def test_plan_refuses_repeated_ids_and_unknown_states(call: Call) -> None:
    twice = await call("plan", items=[{"id": "1", "content": "a"}, {"id": "1", "content": "b"}])
    assert (twice.outcome, twice.facts) == ("error", ())
    assert "repeated: 1" in twice.text
    strange = await call("plan", items=[{"id": "1", "content": "a", "status": "done"}])
    assert "'pending', 'in_progress' or 'completed'" in strange.text
