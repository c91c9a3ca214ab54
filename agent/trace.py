"""A session's records as a trajectory: what training, dashboards and people keep of it.

Built from the journal, never from the view, so that compaction and undo destroy nothing. Secrets are
taken out by shape (`agent.redact`).
"""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from agent.events import (
    TURN_OPENERS,
    ApprovalDecided,
    AssistantMessage,
    Compacted,
    ModelCalled,
    ModelSwitched,
    Record,
    Rewound,
    Seeded,
    SessionOpened,
    ToolFinished,
    ToolStarted,
    TurnEnded,
    Usage,
    UserMessage,
    wire,
)
from agent.redact import redact
from agent.view import AssistantEntry, Call, Entry, UserEntry, chat


def trajectory(
    records: Sequence[Record],
    *,
    tools: list[dict[str, Any]],
    ended_at: datetime | None = None,
    secrets: Iterable[str] = (),
) -> dict[str, Any]:
    """The trajectory of a whole session: all its records, from SessionOpened on.

    `messages` is everything that was ever said, in OpenAI chat format, the system prompt first, turn
    by turn: a message that waited for its turn stands where the turn begins. Tool results follow
    their calls; a call that has none says so. Messages that an undo took out of the view carry
    `"rewound": true`, those that a summary ever stood for `"compacted": true`; the summaries are in
    `events`. `total_cost_usd` is the sum over the priced model calls, `usage_metrics.n_unpriced` tells
    how many it leaves out, and it is None where it would leave out all. `secrets` are literals to
    take out beside those that are known by their shape. Without `ended_at` the session ends with its
    last record.
    """
    opened = records[0].fact
    if not isinstance(opened, SessionOpened):
        raise ValueError("the first record is no SessionOpened")  # noqa: TRY004  the value is wrong
    switched = [r.fact.model for r in records if isinstance(r.fact, ModelSwitched)]
    calls = [r.fact for r in records if isinstance(r.fact, ModelCalled)]
    shown = {
        "messages": _messages(opened, records),
        "events": [{"epoch": record.epoch, **wire(record)} for record in records],
        "tools": tools,
    }
    return {
        "session_id": opened.session_id,
        "user_id": opened.user_id,
        "session_start_time": _iso(records[0].at),
        "session_end_time": _iso(ended_at or records[-1].at),
        "model_name": [opened.model, *switched][-1],
        "total_cost_usd": _cost_usd(calls),
        "usage_metrics": _usage_metrics(records, calls),
        **redact(shown, secrets).value,
    }


def write_trajectory(path: Path, trajectory: dict[str, Any]) -> None:
    """Write the file whole or not at all, durably, for its owner's eyes. Blocks: call it in a thread."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:  # mkstemp's mode is 0600
            json.dump(trajectory, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat()


class _Said(NamedTuple):
    entry: Entry
    rewound: bool = False
    compacted: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """In the order of turns: turns run one after another, in the order of their numbers."""
        return self.entry.turn, self.entry.seq


def _messages(opened: SessionOpened, records: Sequence[Record]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": opened.spec.system_prompt}]
    for said in sorted(_said(records), key=lambda said: said.place):
        marks = {name: True for name in ("rewound", "compacted") if getattr(said, name)}
        messages += [message | marks for message in chat([said.entry])]
    return messages


def _said(records: Sequence[Record]) -> list[_Said]:
    said: list[_Said] = []
    calls: dict[str, Call] = {}
    for seq, _, _, fact in records:
        match fact:
            case UserMessage(turn=turn, text=text):
                said.append(_Said(UserEntry(seq, turn, text)))
            case Seeded(turn=turn, summary=summary):
                said.append(_Said(UserEntry(seq, turn, summary, seed=True)))
            case AssistantMessage(turn=turn, tool_calls=proposed):
                own = {call.tool_call_id: Call(call) for call in proposed}
                calls |= own
                said.append(_Said(AssistantEntry(seq, turn, fact, own)))
            case ApprovalDecided(decisions=decisions):
                for decision in decisions:
                    if decision.arguments is not None and decision.tool_call_id in calls:
                        calls[decision.tool_call_id].arguments = decision.arguments
            case ToolStarted(tool_call_id=call_id, arguments=arguments) if call_id in calls:
                calls[call_id].arguments = arguments
            case ToolFinished(tool_call_id=call_id) if call_id in calls:
                calls[call_id].result = fact
            case Rewound(to=to):
                said = [
                    each._replace(rewound=each.rewound or each.entry.turn > to) for each in said
                ]
            case Compacted(upto=upto):
                last = next((each.place for each in said if each.entry.seq == upto), (0, 0))
                said = [
                    each._replace(
                        compacted=each.compacted or (not each.rewound and each.place <= last)
                    )
                    for each in said
                ]
            case _:
                pass
    return said


def _cost_usd(calls: Sequence[ModelCalled]) -> float | None:
    """None: not one of the calls has a price. No calls cost nothing."""
    priced = [call.cost_usd for call in calls if call.cost_usd is not None]
    return math.fsum(priced) if priced or not calls else None


def _call_metrics(calls: Sequence[ModelCalled]) -> dict[str, Any]:
    usage = sum((call.usage for call in calls if call.usage), Usage())
    return {
        **usage.model_dump(),
        "n_model_calls": len(calls),
        "n_unpriced": sum(call.cost_usd is None for call in calls),
    }


def _usage_metrics(records: Sequence[Record], calls: Sequence[ModelCalled]) -> dict[str, Any]:
    facts = [record.fact for record in records]
    by_model = {
        name: [call for call in calls if call.model == name]
        for name in dict.fromkeys(call.model for call in calls)
    }
    return {
        **_call_metrics(calls),
        "models": {
            name: {**_call_metrics(own), "cost_usd": _cost_usd(own)}
            for name, own in by_model.items()
        },
        "n_tool_calls": sum(len(f.tool_calls) for f in facts if isinstance(f, AssistantMessage)),
        "n_tool_errors": sum(isinstance(f, ToolFinished) and f.outcome == "error" for f in facts),
        "n_turns": sum(isinstance(f, TURN_OPENERS) for f in facts),
        "turns_by_reason": dict(Counter(f.reason for f in facts if isinstance(f, TurnEnded))),
    }
