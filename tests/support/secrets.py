"""Looks for a secret where none may be: in files, databases and texts, plain or encoded."""

import base64
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path


def shapes(secret: str) -> set[bytes]:
    """What the secret looks like plain, in hex, and within base64 at any of its three alignments."""
    plain = secret.encode()
    found = {plain, plain.hex().encode()}
    for n_before, n_cut in ((0, 0), (1, 2), (2, 3)):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(b"\0" * n_before + plain).rstrip(b"=")
            whole = len(encoded) - (1 if (n_before + len(plain)) % 3 else 0)
            found.add(encoded[n_cut:whole])
    return found


def holds(content: bytes, secret: str) -> bool:
    return any(shape in content for shape in shapes(secret))


def places_of(secret: str, *roots: Path) -> list[str]:
    """Files under the directories that hold the secret or have it in their name, and columns of the
    SQLite databases among them."""
    found: list[str] = []
    for root in roots:
        for path in sorted(root.rglob("*")):
            if holds(str(path).encode(), secret):
                found.append(f"the name of {path}")
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                if holds(content, secret):
                    found.append(str(path))
                if content.startswith(b"SQLite format 3"):
                    found += [f"{path}: {place}" for place in columns_with(secret, path)]
    return found


def columns_with(secret: str, database: Path) -> Iterator[str]:
    with closing(sqlite3.connect(database)) as db:
        for (table,) in db.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall():
            rows = db.execute(f'SELECT * FROM "{table}"')
            names = [column[0] for column in rows.description]
            for row in rows:
                for name, value in zip(names, row, strict=True):
                    content = value if isinstance(value, bytes) else str(value).encode()
                    if holds(content, secret):
                        yield f"{table}.{name}"
