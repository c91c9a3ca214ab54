"""`troupe chat`: a session in the terminal, over HTTP.

The program holds no state that the session has not: it may be left at any time, also while the agent
works, and taken up again with `--session`.
"""

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
from rich.console import Console

from serve_app.cli_client import Accepted, Troupe
from serve_app.cli_show import Screen, quoted
from serve_app.sse_client import Lost, Problem

HELP = """\
Type a message and Enter. Ctrl-C interrupts the agent; twice leaves, and the agent goes on.
  /undo       take your last message and all after it back
  /compact    summarise the older conversation
  /model X    use another model from here on
  /close      end the session for ever and write its trajectory
  /quit       leave; come back with --session
  /help       this"""

Ask = Callable[[str], str]
"""Reads a line after a prompt. Raises EOFError at the end and KeyboardInterrupt on Ctrl-C."""


class Left(Exception):
    """The person wants to go."""


class Chat:
    """One person in one session, until they leave or it is closed."""

    def __init__(
        self, troupe: Troupe, session: dict[str, Any], console: Console, ask: Ask = input
    ) -> None:
        self._troupe = troupe
        self._session_id: str = session["session_id"]
        self._screen = Screen(console)
        self._reader = troupe.events(self._session_id, session["cursor"])
        self._ask = ask
        self._closed = session["status"] == "closed"

    def run(self, *, running: bool = False) -> bool:
        """Whether the session can be taken up again. `running`: a turn runs already, somebody else's
        or from before; it is watched first.

        Raises:
            Lost, httpx.TransportError: the server is gone.
        """
        try:
            if running:
                self._follow(None)
            while not self._closed:
                self._guarded(self._approvals)
                self._guarded(lambda: self._line(self._prompt()))
        except (Left, EOFError, KeyboardInterrupt):
            self._screen.end_line()
        return not self._closed

    def _guarded(self, step: Callable[[], None]) -> None:
        """A refusal is news for the person, not the end of the program."""
        try:
            step()
        except Problem as problem:
            self._screen.say(f"[red]{quoted(problem.code)}[/] {quoted(problem.detail)}")
            if problem.status in (401, 403, 404):
                raise Left from problem

    def _prompt(self) -> str:
        try:
            return self._ask("> ").strip()
        except KeyboardInterrupt:
            self._screen.say("[dim](Ctrl-C again to leave)[/]")
        try:
            return self._ask("> ").strip()
        except KeyboardInterrupt:
            raise Left from None

    def _line(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            self._follow(self._troupe.send(self._session_id, line))
            return
        name, _, argument = line[1:].partition(" ")
        match name:
            case "undo" | "close":
                self._command(name)
                self._closed = name == "close"
            case "compact":
                self._follow(self._troupe.command(self._session_id, name))
            case "model" if argument.strip():
                self._command(name, model=argument.strip())
            case "quit":
                raise Left
            case _:
                self._screen.say(quoted(HELP))

    def _command(self, name: str, **body: Any) -> None:
        """One that opens no turn: what it did is there when it is accepted."""
        self._troupe.command(self._session_id, name, **body)
        for event in self._reader.events(follow=False):
            self._screen.show(event)
        self._screen.say(f"[dim]{name}: done[/]")

    def _follow(self, accepted: Accepted | None) -> None:
        """Show events until the turn is at rest: the one that was opened, or whichever runs."""
        turn = accepted.turn if accepted else None
        try:
            self._show_turn(turn)
        except KeyboardInterrupt:
            self._interrupt()
            try:
                self._show_turn(turn)
            except KeyboardInterrupt:
                raise Left from None

    def _show_turn(self, turn: int | None) -> None:
        with closing(self._reader.events(turn=turn)) as events:
            for event in events:
                self._screen.show(event)
                if event.type == "session_closed":
                    self._closed = True
                if event.type == "turn_ended":
                    self._reader.cursor = event.cursor
                    return

    def _interrupt(self) -> None:
        self._screen.say("[yellow]interrupting…[/] [dim](Ctrl-C again to leave)[/]")
        try:
            self._troupe.command(self._session_id, "interrupt")
        except Problem as problem:
            if problem.status != 409:
                raise
            # The turn came to rest by itself in the meantime: its end is in the stream.

    # Approvals

    def _approvals(self) -> None:
        session = self._troupe.session(self._session_id)
        self._closed = session["status"] == "closed"
        asks: list[dict[str, Any]] = session["pending_approval"] or []
        decisions = [decision for ask in asks if (decision := self._decision(ask))]
        if decisions:
            self._follow(self._troupe.decide(self._session_id, decisions))
            self._approvals()

    def _decision(self, ask: dict[str, Any]) -> dict[str, Any] | None:
        """What the person says about a call; None: nothing for the time being."""
        arguments = quoted(json.dumps(ask["arguments"], ensure_ascii=False))
        self._screen.say(f"[yellow]The agent asks:[/] [cyan]{quoted(ask['tool'])}[/] {arguments}")
        while True:
            answer = self._ask("[a]pprove, [r]eject, [e]dit, [l]ater? ").strip().lower()
            match answer[:1]:
                case "a":
                    return {"tool_call_id": ask["tool_call_id"], "decision": "approve"}
                case "r":
                    return {
                        "tool_call_id": ask["tool_call_id"],
                        "decision": "reject",
                        "feedback": self._ask("Why (for the agent; may be empty)? ") or None,
                    }
                case "e":
                    edited = self._edited()
                    if edited is not None:
                        return {
                            "tool_call_id": ask["tool_call_id"],
                            "decision": "edit",
                            "arguments": edited,
                        }
                case "l":
                    return None
                case _:
                    pass

    def _edited(self) -> dict[str, Any] | None:
        text = self._ask("New arguments, as a JSON object on one line: ")
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self._screen.say("[red]That is no JSON object.[/]")
            return None
        return value  # pyright: ignore[reportUnknownVariableType]  JSON objects have string keys


def chat(troupe: Troupe, console: Console, *, session_id: str | None, model: str | None) -> int:
    """Take a session up, or open one, and talk. The exit code."""
    try:
        if session_id is None:
            session = troupe.open(model=model)
        else:
            session = troupe.session(session_id)
            if model:
                troupe.command(session_id, "model", model=model)
        console.print(f"[dim]session {session['session_id']}, model {model or session['model']}[/]")
        console.print("[dim]/help for help, Ctrl-D to leave[/]")
        open_still = Chat(troupe, session, console).run(running=session["status"] == "running")
    except Problem as problem:
        console.print(f"[red]{quoted(problem.code)}[/] {quoted(problem.detail)}")
        return 1
    except (Lost, httpx.TransportError):
        console.print(f"[red]No answer from {troupe.http.base_url}.[/] Is it running?")
        return 1
    if open_still:
        console.print(f"[dim]come back with: troupe chat --session {session['session_id']}[/]")
    return 0
