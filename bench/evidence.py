"""What a run found: counts, times, and violations with what shows them."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

KINDS = (
    "fact lost", "fact repeated", "text gap", "text repeated", "202 not honoured", "effect repeated",
    "wrong outcome", "stuck turn", "turn failed", "given up too early", "slots", "process left", "refused wrongly",
    "harness",
)  # fmt: skip
MAX_FILES = 50
"""Of evidence: more say nothing new."""


PATIENCE_S = 90.0
"""Ray notices the death of a node after up to half a minute, and a process needs seconds to start."""


class Violation(NamedTuple):
    kind: str
    """One of KINDS."""
    session_id: str
    what: str


class Evidence:
    """Filled by everybody in a run, on one loop."""

    def __init__(self, directory: Path, *, patience_s: float = PATIENCE_S) -> None:
        self.directory = directory
        self.patience_s = patience_s
        """Without any event in an open turn; twice of it for a command to be taken up."""
        self.violations: list[Violation] = []
        self.turns: Counter[str] = Counter()
        """Ended ones, by reason."""
        self.given_up = 0
        self.refusals: Counter[str] = Counter()
        """Answers that say try again, by status and code; `lost` for connections."""
        self.n_facts = 0
        self.n_resumed = 0
        """Streams that were taken up again."""
        self.recoveries: dict[str, list[float]] = {}
        """Seconds from a kill under an open turn to its first new fact at a reader, by role."""

    def violated(self, kind: str, session_id: str, what: str, **shown: Any) -> None:
        assert kind in KINDS, kind
        self.violations.append(Violation(kind, session_id, what))
        print(f"VIOLATION {kind}: {what} (session {session_id})", flush=True)
        if len(self.violations) <= MAX_FILES:
            self.directory.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "-", f"{len(self.violations):03}-{kind}-{session_id[:12]}")
            body = {"kind": kind, "session_id": session_id, "what": what} | shown
            text = json.dumps(body, indent=1, default=str)
            (self.directory / f"{name}.json").write_text(text)

    def count(self, kind: str) -> int:
        return sum(violation.kind == kind for violation in self.violations)

    def recovered(self, role: str, after_s: float) -> None:
        self.recoveries.setdefault(role, []).append(after_s)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
