"""Where a session's replay begins: the folded context, kept beside the facts that it came from.

The facts stay the truth. A checkpoint is written in one transaction with facts that follow it; one that
other code made, or that cannot be read, is as good as none, and then all records are read.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import structlog

from agent.context import Context
from agent.journal import PAGE, Checkpoint, Journal, read_all

EVERY = 2000
"""Records after which a session that does not compact gets one. Reading, decoding and folding these takes
about 20 ms, and a checkpoint of their view about 5 ms to make."""
FOLDING = ("context", "events", "held", "spec", "view")

log = structlog.get_logger()


def _code() -> str:
    """A name for the code that folds: whoever changes it changes the name, and need not think of it."""
    sources = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in FOLDING]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


CODE = _code()
"""Made at import: afterwards a loop runs that must not wait for a disk."""


class Replayed(NamedTuple):
    context: Context
    checkpoint_seq: int
    """0: there was none."""


async def replayed(
    journal: Journal, session_id: str, new_context: Callable[[], Context]
) -> Replayed:
    """A session's context as its records tell it, read from its newest checkpoint on.

    Raises:
        NoSuchSession, JournalFault
    """
    checkpoint, records = await journal.replay(session_id, CODE, limit=PAGE)
    context = new_context()
    seq = checkpoint.seq if checkpoint else 0
    if checkpoint is not None:
        try:
            context.restore(checkpoint.body)
        except ValueError:
            log.warning("checkpoint_not_read", session_id=session_id, seq=checkpoint.seq)
            return await _from_the_start(journal, session_id, new_context)
    context.fold(records)
    if len(records) == PAGE:
        context.fold(await read_all(journal, session_id, after=records[-1].seq))
    if context.is_short:
        return await _from_the_start(journal, session_id, new_context)
    return Replayed(context, seq)


async def _from_the_start(
    journal: Journal, session_id: str, new_context: Callable[[], Context]
) -> Replayed:
    context = new_context()
    context.fold(await read_all(journal, session_id))
    return Replayed(context, 0)


def checkpoint_due(context: Context, last_seq: int) -> Checkpoint | None:
    """The checkpoint that belongs beside the next facts, where the last one lies too far behind."""
    if context.boundary > last_seq or context.head - last_seq >= EVERY:
        return Checkpoint(context.head, CODE, context.checkpointed())
    return None
