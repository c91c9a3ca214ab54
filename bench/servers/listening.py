"""Where a program of the bench listens: it says so in its first line of output."""

import socket


def listening() -> socket.socket:
    """A listening socket on a free port of loopback, printed as a URL."""
    # The protocol is named, or asyncio takes it for no TCP and leaves Nagle's algorithm on: 40 ms a turn.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    return listener
