"""JSON text that a model or a user wrote: it may be anything."""

import json
from typing import Any


def parsed(text: str) -> Any:
    """
    Raises:
        ValueError: no JSON, or nested deeper than Python reads (a model that loops on "[" gets there).
    """
    try:
        return json.loads(text)
    except RecursionError as cause:
        raise ValueError("the JSON is nested too deep") from cause


def is_object(text: str) -> bool:
    try:
        return isinstance(parsed(text), dict)
    except ValueError:
        return False
