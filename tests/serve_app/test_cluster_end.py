"""What `troupe down` leaves behind, without Ray."""

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from agent.settings import AgentSettings
from serve_app.cluster import _settle_journal
from serve_app.settings import TroupeSettings

WRITER = """
import asyncio, os, signal, sys
from pathlib import Path
from agent.journal_sqlite import SqliteJournal
from agent.events import SessionOpened
from agent.spec import AgentSpec

async def main():
    journal = await SqliteJournal.open(Path(sys.argv[1]))
    spec = AgentSpec(name="t", system_prompt="", model="m")
    await journal.create(SessionOpened(session_id="s", user_id="u", agent="t", model="m", spec=spec))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_journal_whose_writers_were_killed_ends_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite3"
    wal = tmp_path / "journal.sqlite3-wal"
    ran = subprocess.run([sys.executable, "-c", WRITER, str(file)], timeout=30, check=False)
    assert ran.returncode == -signal.SIGKILL
    assert wal.stat().st_size > 0
    _settle_journal(TroupeSettings(agent=AgentSettings(storage_dir=tmp_path)))
    assert not wal.exists()
    file.rename(tmp_path / "copy.sqlite3")
    with sqlite3.connect(tmp_path / "copy.sqlite3") as db:
        assert db.execute("SELECT session_id FROM sessions").fetchall() == [("s",)]
    db.close()
