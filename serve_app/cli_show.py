"""Events on a terminal.

Text arrives twice: as deltas while it is written, and whole in its fact. What was shown of a part
is counted, so a delta that comes again, or a fact after its preview, prints only what is missing.
"""

import json
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape

from serve_app.sse_client import Event, Problem

MAX_ARGUMENT_CHARS = 400
MAX_RESULT_CHARS = 1200
MAX_PARTS = 256
"""Of which it is remembered how much was shown; older ones do not come again."""
MARKS = {"ok": "[green]✓[/]", "error": "[red]✗[/]", "denied": "[yellow]∅[/]"}


class Screen:
    """Prints one session's events, each at most once."""

    def __init__(self, console: Console, *, every_fact: bool = False) -> None:
        """`every_fact`: also those that are about how the session is run, not what was said."""
        self._console = console
        self._every_fact = every_fact
        self._seq = 0
        self._shown: dict[str, int] = {}
        self._at_line_start = True

    def show(self, event: Event) -> None:
        data = event.data
        match event.type:
            case "text_delta":
                self._stream(f"text {data['part_id']}", data["offset"], data["text"])
            case "tool_output_delta":
                self._stream(f"tool {data['tool_call_id']}", data["offset"], data["text"], "dim")
            case _:
                if data["seq"] > self._seq:
                    self._seq = data["seq"]
                    self._fact(event.type, data)

    def say(self, markup: str) -> None:
        """A line of its own, in Rich's markup."""
        self.end_line()
        self._console.print(markup, highlight=False, emoji=False)

    def asked(self, lead: str, ask: dict[str, Any]) -> None:
        """A call that waits for a person: of the event, or of the session."""
        arguments = ask["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.say(f"[yellow]{lead}[/] [cyan]{quoted(ask['tool'])}[/] {quoted(arguments)}")
        if ask["reason"]:
            self.say(f"  [dim]because:[/] {quoted(ask['reason'])}")

    def end_line(self) -> None:
        if not self._at_line_start:
            self._console.print()
        self._at_line_start = True

    def _stream(self, part: str, offset: int, text: str, style: str | None = None) -> None:
        shown = self._shown.get(part, 0)
        fresh = text[max(0, shown - offset) :]
        if not fresh:
            return
        self._shown[part] = max(shown, offset + len(text))
        while len(self._shown) > MAX_PARTS:
            del self._shown[next(iter(self._shown))]
        self._console.out(printable(fresh), end="", style=style, highlight=False)
        self._at_line_start = fresh.endswith("\n")

    def _fact(self, kind: str, data: dict[str, Any]) -> None:
        match kind:
            case "assistant_message":
                self._stream(f"text {data['part_id']}", 0, data["text"])
                self.end_line()
            case "tool_started":
                arguments = quoted(shortened(data["arguments"], MAX_ARGUMENT_CHARS))
                self.say(f"[cyan]▶ {quoted(data['tool'])}[/] [dim]{arguments}[/]")
            case "tool_finished":
                self._finished(data)
            case "plan_updated":
                boxes = {"completed": "[green]■[/]", "in_progress": "[yellow]▣[/]"}
                for item in data["items"]:
                    self.say(f"  {boxes.get(item['status'], '□')} {quoted(item['content'])}")
            case "approval_requested":
                for ask in data["asks"]:
                    self.asked("?", ask)
            case "model_switched":
                self.say(f"[dim]model: {quoted(data['model'])}[/]")
            case "compacted":
                self.say("[dim]the older conversation became a summary[/]")
            case "compaction_failed" | "turn_ended":
                self._ended(kind, data)
            case _ if self._every_fact:
                self._aside(kind, data)
            case _:
                pass

    def _aside(self, kind: str, data: dict[str, Any]) -> None:
        self.say(f"[dim]{data['seq']:>4} {kind} {quoted(aside(data))}[/]")

    def _finished(self, data: dict[str, Any]) -> None:
        mark = MARKS.get(data["outcome"], "[red]?[/]")
        seen = self._shown.get(f"tool {data['tool_call_id']}", 0)
        told = seen or data["tool"] == "plan"  # whose fact was shown
        result = "" if told else quoted(shortened(data["text"], MAX_RESULT_CHARS))
        took = f"[dim]{quoted(data['tool'])} {data['outcome']}, {data['duration_ms']} ms[/]"
        self.say(f"{mark} {took}" + (f"\n[dim]{result}[/]" if result else ""))

    def _ended(self, kind: str, data: dict[str, Any]) -> None:
        if data.get("reason") in {"done", "approval"}:
            if self._every_fact:
                self._aside(kind, data)
            return
        what = "compaction" if kind == "compaction_failed" else f"turn {data['reason']}"
        detail = data.get("detail") or data.get("code") or ""
        self.say(f"[red]{what}[/]" + (f": {quoted(detail)}" if detail else ""))


CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(32), *range(127, 160))
    if chr(code) != "\n"
} | {ord("\t"): "    "}


def printable(text: str) -> str:
    """Without what would move the cursor, set the clipboard, or otherwise drive the terminal: the
    text was written by a model or a program that it ran. Tab stops would be counted from where a
    piece of the stream begins, so a tab is four spaces."""
    return text.translate(CONTROLS)


def quoted(text: str) -> str:
    """Foreign text inside Rich's markup."""
    return escape(printable(text))


def refusal(problem: Problem) -> str:
    """What the server said no with, in Rich's markup."""
    hint = " Give `--key` or set TROUPE_KEY." if problem.status == 401 else ""
    return f"[red]{quoted(problem.code)}[/]: {quoted(problem.detail)}{hint}"


def age(at: str) -> str:
    """How long ago that was, in the largest unit of which there is one."""
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


UNTOLD = {"type", "seq", "at", "message_id"}


def aside(data: dict[str, Any]) -> str:
    """The short fields of a fact, for those that get no words of their own."""
    fields = {name: value for name, value in data.items() if name not in UNTOLD}
    brief = [f"{name}={value}" for name, value in fields.items() if value not in (None, "", {}, 0)]
    return shortened(" ".join(brief), MAX_ARGUMENT_CHARS)


def shortened(text: str, limit: int) -> str:
    """Cut in the middle, where the least is lost."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} …{len(text) - 2 * half} more… {text[-half:]}"
