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
from serve_app.cli_show import Screen, quoted, refusal, shortened
from serve_app.sse_client import Event, Lost, Problem

HELP = """\
Type a message and Enter. Ctrl-C interrupts the agent; twice leaves, and the agent goes on.
  /undo       take your last message and all after it back
  /compact    summarise the older conversation
  /model X    use another model from here on
  /approvals  come back to the calls that you put off
  /close      end the session for ever and write its trajectory
  /quit       leave; come back with --session
  /help       this"""

MAX_RECALLED_CHARS = 600
"""Of each message of the exchange that a chat is taken up after."""
STATUS = {
    "running": "a turn runs; what it does comes next",
    "waiting_approval": "the agent waits for your decision",
    "passive": "it rests in the journal; your next message wakes it",
    "closed": "nothing can be said to it any more",
}

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
        self._put_off: set[str] = set()
        """Calls that wait and are not asked about until the person comes back to them."""
        self._reasons: dict[str, str] = {}
        """Why a call needs a person: its event says so, the session does not."""
        self._warned = False
        """The next Ctrl-C at the prompt leaves."""

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
            self._screen.say(refusal(problem))
            if problem.status in (401, 403, 404):
                raise Left from problem

    def _prompt(self) -> str:
        while True:
            try:
                line = self._ask("> ").strip()
            except KeyboardInterrupt:
                if self._warned:
                    raise Left from None
                self._warn()
            else:
                self._warned = False
                return line

    def _warn(self, what: str = "") -> None:
        self._warned = True
        self._screen.say(f"{what}[dim](Ctrl-C again to leave)[/]")

    def _line(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            accepted = self._troupe.send(self._session_id, line)
            self._put_off.clear()  # the message settled them
            self._follow(accepted)
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
            case "model":
                self._screen.say("[red]/model needs a name[/], such as /model openai/gpt-5.6")
            case "approvals":
                self._put_off.clear()  # so they are asked about before the next prompt
                if not self._waiting():
                    self._screen.say("[dim]no call waits[/]")
            case "quit":
                raise Left
            case "help":
                self._screen.say(quoted(HELP))
            case _:
                self._screen.say(f"[red]There is no command /{quoted(name)}.[/]")
                self._screen.say(quoted(HELP))

    def _command(self, name: str, **body: Any) -> None:
        """One that opens no turn: what it did is there when it is accepted."""
        self._troupe.command(self._session_id, name, **body)
        for event in self._reader.events(follow=False):
            self._screen.show(event)
        if name != "model":  # whose event said it
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
                if event.type == "approval_requested":  # shown with the question
                    self._learn(event)
                else:
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

    def _waiting(self) -> list[dict[str, Any]]:
        session = self._troupe.session(self._session_id)
        self._closed = session["status"] == "closed"
        return session["pending_approval"] or []

    def _approvals(self) -> None:
        while asks := [a for a in self._waiting() if a["tool_call_id"] not in self._put_off]:
            try:
                decisions = [decision for ask in asks if (decision := self._decision(ask))]
            except KeyboardInterrupt:
                self._put_off |= {ask["tool_call_id"] for ask in asks}
                self._warn("[dim]nothing was decided; /approvals comes back to it[/] ")
                return
            if decisions:
                self._follow(self._troupe.decide(self._session_id, decisions))

    def _decision(self, ask: dict[str, Any]) -> dict[str, Any] | None:
        """What the person says about a call; None: put off."""
        reason = self._reason(ask["tool_call_id"])
        self._screen.asked("The agent asks:", ask | {"reason": reason})
        chosen: dict[str, Any] = {"tool_call_id": ask["tool_call_id"]}
        while True:
            match self._ask("[a]pprove, [r]eject, [e]dit, [l]ater? ").strip().lower():
                case "a" | "approve":
                    return chosen | {"decision": "approve"}
                case "r" | "reject":
                    why = self._ask("Why (for the agent; may be empty)? ")
                    return chosen | {"decision": "reject", "feedback": why or None}
                case "e" | "edit":
                    edited = self._edited()
                    if edited is not None:
                        return chosen | {"decision": "edit", "arguments": edited}
                case "l" | "later":
                    self._put_off.add(ask["tool_call_id"])
                    self._screen.say(
                        "[dim]put off: /approvals comes back to it; a new message denies it[/]"
                    )
                    return None
                case _:
                    self._screen.say("[red]Answer a, r, e or l[/] (Ctrl-C: back to the prompt).")

    def _learn(self, event: Event) -> None:
        self._reasons |= {ask["tool_call_id"]: ask["reason"] for ask in event.data["asks"]}

    def _reason(self, tool_call_id: str) -> str:
        if tool_call_id not in self._reasons:  # asked before this chat
            past = self._troupe.events(self._session_id, "0.0.0")
            for event in past.events(follow=False):
                if event.type == "approval_requested":
                    self._learn(event)
        return self._reasons.get(tool_call_id, "")

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
                session = troupe.session(session_id)  # its cursor is after the switch
        console.print(f"[dim]session {session['session_id']}, model {quoted(session['model'])}[/]")
        if session_id is not None:
            _recall(troupe, session, console)
        console.print("[dim]/help for help, Ctrl-D to leave[/]")
        open_still = Chat(troupe, session, console).run(running=session["status"] == "running")
    except Problem as problem:
        console.print(refusal(problem))
        return 1
    except (Lost, httpx.TransportError):
        console.print(f"[red]No answer from {troupe.http.base_url}.[/] Is it running?")
        return 1
    if open_still:
        console.print(f"[dim]come back with: troupe chat --session {session['session_id']}[/]")
    return 0


def _recall(troupe: Troupe, session: dict[str, Any], console: Console) -> None:
    """Show where the conversation was left: its last exchange, and what is the matter if it does not
    just rest."""
    messages = troupe.get(f"/v1/sessions/{session['session_id']}/messages")["data"]
    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    since = messages[users[-1] :] if users else messages
    for role, mark in (("user", "[bold]>[/] "), ("assistant", "")):
        said = [text for one in since if one["role"] == role and (text := one.get("content"))]
        if said:
            console.print(mark + quoted(shortened(said[-1], MAX_RECALLED_CHARS)), highlight=False)
    n_waiting = len(session["pending_approval"] or [])
    if session["status"] != "idle":
        status = session["status"]
        console.print(f"[yellow]{status}[/]: {STATUS.get(status, '')}", highlight=False)
    if n_waiting:
        console.print(f"[yellow]{n_waiting} call{'s'[: n_waiting > 1]} to decide[/]")
