"""What the load's users ask for: scripts of `scripted/puppet`, each with an effect that can be counted."""

import random
from typing import Any, Literal, NamedTuple

import yaml


class Script(NamedTuple):
    text: str
    mark: str = ""
    """A line that the turn adds to marks.txt, once; empty: it does not."""
    decision: Literal["approve", "reject"] = "approve"
    """To whatever a person is asked."""
    interrupt_after_s: float | None = None


def draw(rng: random.Random, mark: str) -> Script:
    """A turn of one to ten seconds. Marks are words that occur nowhere else."""
    kind = rng.choices(["work", "talk", "both", "ask", "left", "interrupt"], [4, 3, 2, 2, 1, 1])[0]
    effect = f"echo {mark} >> marks.txt"
    talk = said(f"My answer to {mark}. " * rng.randint(3, 20), rng)
    work = {
        "call": "bash",
        "args": {"command": f"{effect}; sleep {rng.uniform(0.1, 3):.2f}; echo ok"},
    }
    match kind:
        case "work":
            return Script(script({"say": f"I work on {mark}."} | work, READ, talk), mark)
        case "talk":
            return Script(script(talk))
        case "both":
            other = {
                "call": "bash",
                "args": {"command": f"sleep {rng.uniform(0.1, 1):.2f}; seq 300"},
            }
            plan = {"call": "plan", "args": {"items": [{"id": "1", "content": mark}]}}
            return Script(script({"calls": [work, other, plan]}, talk), mark)
        case "ask":
            asked = {"call": "bash", "args": {"command": f": ask; {effect}"}}
            decision = rng.choice(["approve", "approve", "reject"])
            return Script(script(asked, talk), mark, decision=decision)
        case "left":
            # The job stays behind in the sandbox, for as long as that lives.
            left = {"call": "bash", "args": {"command": f"{effect}; sleep 7777 & echo left"}}
            return Script(script(left, talk), mark)
        case _:
            long = {"say": f"{mark} goes on and on. " * 40, "chunks": 80, "delay_s": 0.1}
            return Script(script(long), interrupt_after_s=rng.uniform(0.2, 3.0))


READ = {"call": "read", "args": {"path": "marks.txt"}}


def said(text: str, rng: random.Random) -> dict[str, Any]:
    return {"say": text, "chunks": rng.randint(5, 40), "delay_s": round(rng.uniform(0.02, 0.15), 3)}


def script(*steps: dict[str, Any]) -> str:
    return yaml.safe_dump(list(steps))


def cat_marks() -> Script:
    """Reads the effects; `read` may run again after a crash, so its result is always one."""
    touched = {"call": "bash", "args": {"command": "cat marks.txt 2>/dev/null || true"}}
    return Script(script(touched))


def poison() -> Script:
    """Its shell's parent is the warden, whose parent is the session's process."""
    kill = "kill -9 $(awk '/^PPid/{print $2}' /proc/$PPID/status); sleep 60"
    return Script(script(*[{"call": "bash", "args": {"command": kill}}] * 12))
