"""`bash`."""

from typing import ClassVar

from pydantic import BaseModel, Field, create_model

from agent.sandbox.contract import ExecResult
from agent.settings import ToolSettings
from agent.tools.arguments import Arguments
from agent.tools.contract import ToolResult, ToolScope


class BashArguments(Arguments):
    command: str = Field(description="The command, as bash reads it. It may span lines.")
    timeout_s: float | None = Field(default=None, gt=0)


class Bash:
    name: ClassVar[str] = "bash"
    description: ClassVar[str] = (
        "Run a command in the session's bash and return its output (stdout and stderr together) and "
        "exit code. The shell lasts: `cd`, exported variables and functions are there in the next "
        "call. There is no terminal and stdin is empty, so use non-interactive options. Start "
        "servers in the background with their output in a file (`cmd >log 2>&1 &`). Long output is "
        "cut in the middle; the full text stays in a file that the result names. A command over its "
        "time is killed together with all background processes of the session."
    )
    Arguments: ClassVar[type[BaseModel]] = BashArguments
    idempotent: ClassVar[bool] = False

    def __init__(self, settings: ToolSettings) -> None:
        self._settings = settings
        # The instance's own schema: the limits that the model must know are settings.
        self.Arguments = create_model(  # pyright: ignore[reportIncompatibleVariableOverride, reportAttributeAccessIssue] see above
            "BashArguments",
            __base__=BashArguments,
            timeout_s=(
                float | None,
                Field(
                    default=None,
                    gt=0,
                    le=settings.bash_max_timeout_s,
                    description=f"Seconds until the command is killed: {settings.bash_timeout_s:g} "
                    f"if not given, at most {settings.bash_max_timeout_s:g}.",
                ),
            ),
        )

    async def run(self, arguments: BashArguments, scope: ToolScope) -> ToolResult:
        timeout_s = arguments.timeout_s or self._settings.bash_timeout_s
        sandbox = await scope.sandbox()
        result = await sandbox.exec(
            arguments.command,
            timeout_s=timeout_s,
            max_output_bytes=self._settings.max_output_bytes,
            on_output=scope.show,
        )
        return ToolResult(_told(result, timeout_s), "ok" if result.exit_code == 0 else "error")


def _told(result: ExecResult, timeout_s: float) -> str:
    text = (
        result.output if not result.output or result.output.endswith("\n") else result.output + "\n"
    )
    if result.timed_out:
        return (
            f"{text}[killed after {timeout_s:g} s, with all background processes; the shell is new, in "
            "the directory and with the exported variables from before this command]"
        )
    return f"{text}[exit code {result.exit_code}]"
