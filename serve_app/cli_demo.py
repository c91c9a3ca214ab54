"""`troupe demo`: the whole way once, over HTTP, with a script in the place of a model."""

from pathlib import Path
from typing import Any

from rich.console import Console

from serve_app.cli_client import Troupe
from serve_app.cli_models import SCRIPTED
from serve_app.cli_show import Screen

AGENT = "demo"
TASK = "Write a small script that makes a table of squares, run it, and check what it wrote."


def demo(url: str, storage_dir: Path, console: Console) -> int:
    """The main job against a running house. The exit code: 0 only if the turn ended `done`.

    Raises:
        Problem, Lost, httpx.TransportError
    """
    screen = Screen(console, every_fact=True)
    console.print(
        f"[bold]A scripted model plays[/] ({SCRIPTED}): no provider is asked, the rest is real."
    )
    with Troupe(url) as troupe:
        session = troupe.open(model=SCRIPTED, title="demo", agent=AGENT)
        session_id = session["session_id"]
        console.print(f"POST {url}/v1/sessions → 201, session {session_id}")
        accepted = troupe.send(session_id, TASK)
        console.print(f"POST …/messages → 202, turn {accepted.turn}: {TASK}\n")
        reader = troupe.events(session_id, "0.0.0")
        ended: dict[str, Any] = {}
        for event in reader.events(turn=accepted.turn):
            screen.show(event)
            if event.type == "turn_ended":
                ended = event.data
        screen.end_line()
        troupe.command(session_id, "close")
    path = storage_dir / "trajectories" / f"{session_id}.json"
    reason = ended.get("reason", "unknown")
    console.print(f"\nThe turn ended: {reason}. Its trajectory:")
    console.print(str(path), soft_wrap=True, highlight=False)
    return 0 if reason == "done" and path.is_file() else 1
