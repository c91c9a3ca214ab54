"""Which journal a URL means."""

from pathlib import Path

from agent.faults import SettingsInvalid
from agent.journal import Journal
from agent.journal_memory import MemoryJournal
from agent.journal_sqlite import SqliteJournal


async def open_journal(url: str, storage_dir: Path) -> Journal:
    """Open `memory:`, or `sqlite:///path` (relative to `storage_dir`; `sqlite:////path` is absolute).

    Raises:
        SettingsInvalid: the URL means no journal.
        JournalFault: the store cannot be opened, or has the schema of another version.
    """
    if url == "memory:":
        return MemoryJournal()
    path = url.removeprefix("sqlite:///")
    if path == url or not path or "?" in path:
        raise SettingsInvalid(f"journal_url: {url!r} is neither memory: nor sqlite:///path")
    return await SqliteJournal.open(storage_dir / path)
