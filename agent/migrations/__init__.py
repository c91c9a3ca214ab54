"""The schemas of the journals, as numbered SQL files: `<store>/0001_words.sql`, `0002_...`, without a gap.

A file that was released is never changed: a schema of version n is what the first n files made.
"""

from pathlib import Path


def steps(store: str) -> tuple[str, ...]:
    """The SQL text of each step; the schema's version is how many were taken."""
    files = sorted((Path(__file__).parent / store).glob("*.sql"))
    numbers = [int(file.name.split("_")[0]) for file in files]
    if numbers != list(range(1, len(files) + 1)):
        raise ValueError(f"the migrations of {store} are numbered {numbers}")
    return tuple(file.read_text(encoding="utf-8") for file in files)
