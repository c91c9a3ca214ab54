"""A process that writes to a session until it is fenced or killed: `path session_id n_records`.

It prints its epoch, then the seq of each append that was acknowledged, then `fenced` or `finished`.
"""

import asyncio
import sys

from agent.events import UserMessage
from agent.faults import Fenced
from agent.journal_sqlite import SqliteJournal


async def main(path: str, session_id: str, n_records: int) -> None:
    journal = await SqliteJournal.open(path)
    epoch = await journal.fence(session_id)
    print("epoch", epoch, flush=True)
    try:
        for n in range(n_records):
            records = await journal.append(session_id, epoch, [UserMessage(text=str(n))] * 2)
            print("seq", records[-1].seq, flush=True)
    except Fenced:
        print("fenced", 0, flush=True)
    else:
        print("finished", 0, flush=True)
    await journal.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
