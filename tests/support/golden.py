"""The golden journals: sessions as earlier versions wrote them."""

import json
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from agent.events import FACT, Record

GOLDEN = Path(__file__).parent.parent / "golden"
JOURNALS = sorted(GOLDEN.glob("journal_*.jsonl"))


class GoldenLine(NamedTuple):
    record: Record
    body: str
    """The fact's own bytes in the file."""


def golden(path: Path) -> list[GoldenLine]:
    lines: list[GoldenLine] = []
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        place = json.loads(line)
        body = line.partition('"fact":')[2].removesuffix("}")
        fact = FACT.validate_json(body)
        at = datetime.fromisoformat(place["at"])
        lines.append(GoldenLine(Record(place["seq"], place["epoch"], at, fact), body))
    return lines
