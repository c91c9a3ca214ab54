"""Owns a sandbox until it is killed: `python sandbox_owner.py KIND WORKSPACE MARK [SESSION_ID EPOCH]`.

Prints a line when its sandbox runs processes named MARK, then waits for ever."""

import asyncio
import sys
from pathlib import Path

from agent.sandbox.local import open_sandbox
from agent.spec import SandboxSpec


async def main(
    kind: str, workspace: str, mark: str, session_id: str = "", epoch: str = "1"
) -> None:
    spec = SandboxSpec.model_validate({"kind": kind})
    sandbox = await open_sandbox(
        spec, Path(workspace), session_id=session_id or mark, epoch=int(epoch)
    )
    sleep = f"/bin/bash -c 'exec -a {mark} /bin/sleep 600'"
    await sandbox.exec(f"setsid {sleep} & disown", timeout_s=10)
    await sandbox.exec(f"setsid nohup env -i {sleep} >nohup.out & disown", timeout_s=10)
    print("ready", flush=True)
    await sandbox.exec(f"bash -c 'exec -a {mark} sleep 600'", timeout_s=600)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
