# What `.ci/run` runs, one by one. `just` alone: all of it.

default: ci

# Write the format
fmt:
    uv run ruff format .
    uv run ruff check --fix-only .

# Check format and lint
lint:
    uv run ruff format --check .
    uv run ruff check .

types:
    uv run pyright

# One file or name: `just test tests/agent -k undo`
test *args:
    uv run pytest {{args}}

ci: lint types test
