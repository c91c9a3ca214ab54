"""What was written once can be read for ever, and means the same."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from agent.events import AnyFact, Fact
from agent.journal import SessionRow
from tests.support.golden import GOLDEN, JOURNALS, golden


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_every_line_is_read_and_written_back_byte_by_byte(path: Path) -> None:
    for record, body in golden(path):
        # Fields that came later have defaults and are not in old lines.
        assert record.fact.model_dump_json(exclude_unset=True) == body


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_the_digest_of_the_records_is_what_it_was(path: Path) -> None:
    records = [line.record for line in golden(path)]
    row = SessionRow.opened(records[0].fact, records[0].at)
    for record in records:
        row = row.after(record)
    expected = GOLDEN / path.name.replace("journal_", "row_").replace(".jsonl", ".json")
    shown = SessionRow.model_validate_json(expected.read_text(encoding="utf-8"))
    assert row.model_dump(include=shown.model_fields_set) == shown.model_dump(exclude_unset=True)


def test_every_fact_and_every_field_stands_in_some_golden_journal() -> None:
    seen: dict[type[Fact], set[str]] = {}
    for path in JOURNALS:
        for record, _ in golden(path):
            fields = seen.setdefault(type(record.fact), set())
            fields |= record.fact.model_fields_set
    kinds: tuple[type[BaseModel], ...] = get_args(get_args(AnyFact)[0])
    assert {kind: set(kind.model_fields) for kind in kinds} == seen
