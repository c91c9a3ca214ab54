"""Which journal the settings mean. A store's driver is imported by those who use it, no one else."""

from pathlib import Path

from agent.faults import SettingsInvalid
from agent.journal import Journal
from agent.settings import JournalSettings

POSTGRES = ("postgresql://", "postgres://")


async def open_journal(
    settings: JournalSettings, storage_dir: Path, *, max_connections: int = 4, check: bool = True
) -> Journal:
    """Open `memory:`, `sqlite:///path` (relative to `storage_dir`; `sqlite:////path` is absolute), or
    `postgresql://user@host:port/database`.

    `max_connections` is the most at once to a server. Without `check` a store may be away: what is
    wrong with it shows at the first use.

    Raises:
        SettingsInvalid: the URL means no journal.
        JournalFault: the store cannot be opened, or has the schema of another version.
    """
    if settings.url == "memory:":
        from agent.journal_memory import MemoryJournal

        return MemoryJournal()
    if settings.url.startswith(POSTGRES):
        from agent.journal_postgres import PostgresJournal

        server = PostgresJournal(
            settings.url,
            timeout_s=settings.timeout_s,
            max_connections=max_connections,
            sync=settings.sync,
        )
        return await server.checked() if check else server
    from agent.journal_sqlite import SqliteJournal

    file = SqliteJournal(storage_dir / _path(settings.url), sync=settings.sync)
    return await file.checked() if check else file


def _path(url: str) -> str:
    path = url.removeprefix("sqlite:///")
    if path == url or not path or "?" in path:
        raise SettingsInvalid(
            f"journal.url: {url.partition(':')[0]!r} is neither memory:, nor sqlite:///path,"
            " nor postgresql://user@host:port/database"
        )
    return path
