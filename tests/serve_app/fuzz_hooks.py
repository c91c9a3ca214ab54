"""What schemathesis cannot know about this API: loaded by `test_fuzz`, never by pytest itself."""

import json
from typing import Any

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.generation import GenerationMode
from schemathesis.openapi.checks import RejectedPositiveData


@schemathesis.hook
def filter_failure(context: Any, failure: Exception, case: Any, response: Any) -> bool:
    """Keep what is a fault.

    A request that fits the schema may still ask for what cannot be (an agent that does not exist, two
    idempotency keys that differ, a cursor of another list): 422 in words, without a list of fields.
    A text over the limit, which does not fit the schema, is 413 and not 422.
    """
    del context, case
    if isinstance(failure, RejectedPositiveData):
        return response.status_code != 422 or "errors" in json.loads(response.content)
    if isinstance(failure, AcceptedNegativeData):
        return response.status_code != 413
    return True


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """One idempotency key is enough: two that differ would make most requests invalid. And where the
    tool finds no header for a pattern of three numbers it takes `0`, which it then holds to be valid."""
    del context
    if not case.meta or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return case
    headers = dict(case.headers or {})
    if isinstance(case.body, dict) and "message_id" in case.body:
        headers.pop("Idempotency-Key", None)
    if headers.get("last-event-id") == "0":
        headers["last-event-id"] = "0.0.0"
    case.headers = headers
    return case
