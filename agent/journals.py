"""Which journal a URL means."""

from pathlib import Path

from agent.faults import SettingsInvalid
from agent.journal import Journal
from agent.journal_memory import MemoryJournal
from agent.journal_postgres import PostgresJournal
from agent.journal_sqlite import SqliteJournal

POSTGRES = ("postgresql://", "postgres://")


async def open_journal(
    url: str,
    storage_dir: Path,
    *,
    timeout_s: float = 10.0,
    max_connections: int = 4,
    check: bool = True,
) -> Journal:
    """Open `memory:`, `sqlite:///path` (relative to `storage_dir`; `sqlite:////path` is absolute), or
    `postgresql://user@host:port/database`.

    `timeout_s` is the limit of one answer, and `max_connections` the most at once, of a server.
    Without `check` a store may be away: what is wrong with it shows at the first use.

    Raises:
        SettingsInvalid: the URL means no journal.
        JournalFault: the store cannot be opened, or has the schema of another version.
    """
    if url == "memory:":
        return MemoryJournal()
    if url.startswith(POSTGRES):
        if not check:
            return PostgresJournal(url, timeout_s=timeout_s, max_connections=max_connections)
        return await PostgresJournal.open(url, timeout_s=timeout_s, max_connections=max_connections)
    path = url.removeprefix("sqlite:///")
    if path == url or not path or "?" in path:
        raise SettingsInvalid(
            f"journal_url: {url.partition(':')[0]!r} is neither memory:, nor sqlite:///path,"
            " nor postgresql://user@host:port/database"
        )
    return (
        await SqliteJournal.open(storage_dir / path) if check else SqliteJournal(storage_dir / path)
    )
