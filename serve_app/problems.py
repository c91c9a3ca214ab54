"""Whatever goes wrong, as `application/problem+json` (RFC 9457).

A problem says what the matter is in a stable `code` and a sentence that was written for the caller.
It never shows the text of an exception that was not: those get an `error_id` that the log has too.
"""

import math
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from actors.protocol import (
    AtCapacity,
    Conflict,
    Invalid,
    NotFound,
    QueueFull,
    QuotaExceeded,
    TooLarge,
    Unavailable,
)
from agent.faults import Fault, JournalFault

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 20
"""Of one body: who sends a thousand wrong fields can correct twenty first."""
RETRY_AFTER_S = 2.0
"""When the cluster did not answer and nobody knows better: about a restart of one actor."""


class Unauthorized(Fault):
    code = "unauthorized"


class Forbidden(Fault):
    """Only in dev mode: a page of another site, or another name for this host."""

    code = "forbidden"


class UnsupportedMediaType(Fault):
    code = "unsupported_media_type"


class FieldError(BaseModel):
    where: str
    """`body.text`, `query.limit`."""
    problem: str


class Problem(BaseModel):
    """The body of every answer that is an error. Faults add their own members (scope, limit, ...)."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(pattern="^urn:troupe:problem:[a-z_]+$")
    title: str
    status: int = Field(ge=400, le=599)
    code: str
    detail: str
    retry_after_s: float | None = Field(default=None, description="Also the Retry-After header")
    error_id: str | None = Field(default=None, description="Also in the server's log")
    errors: list[FieldError] | None = Field(default=None, description="What is wrong, and where")


TITLES = {
    "unauthorized": "No valid key",
    "forbidden": "Not from there",
    "not_found": "Not found",
    "method_not_allowed": "Method not allowed",
    "conflict": "Not possible in this state",
    "too_large": "Too large",
    "unsupported_media_type": "Not JSON",
    "invalid": "Invalid request",
    "at_capacity": "No free slot",
    "quota": "Daily quota used up",
    "queue_full": "Too many are waiting",
    "internal": "Internal error",
    "unavailable": "Not available at the moment",
    "bad_request": "Bad request",
}

STATUSES: tuple[tuple[type[Fault], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (TooLarge, 413),
    (UnsupportedMediaType, 415),
    (Invalid, 422),
    (QueueFull, 429),
    (QuotaExceeded, 429),
    (Unavailable, 503),
)
"""AtCapacity has two; every other fault was not meant for callers and is `internal`."""

HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
"""Of errors that the framework finds itself."""


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    fields: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An answer. `fields` come beside the standard members and never replace them."""
    body = dict(fields or {}) | {
        "type": f"urn:troupe:problem:{code}",
        "title": TITLES[code],
        "status": status,
        "code": code,
        "detail": detail,
    }
    all_headers = dict(headers or {})
    retry_after_s: float | None = (fields or {}).get("retry_after_s")
    if retry_after_s is not None:
        all_headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return JSONResponse(body, status, all_headers, MEDIA_TYPE)


def of_fault(fault: Fault, error_id: str) -> JSONResponse:
    if isinstance(fault, AtCapacity):
        status = 429 if fault.fields.get("scope") == "per_user" else 503
        return problem(status, fault.code, fault.detail, fields=fault.fields)
    if isinstance(fault, JournalFault):
        log.error("journal_unavailable", error_id=error_id, exc_info=fault)
        fault = Unavailable("The journal did not answer. Repeat with the same message_id.")
    for kind, status in STATUSES:
        if isinstance(fault, kind):
            default = {"retry_after_s": RETRY_AFTER_S} if kind is Unavailable else {}
            return problem(
                status,
                kind.code,
                fault.detail,
                fields=default | fault.fields,
                headers={"WWW-Authenticate": "Bearer"} if kind is Unauthorized else None,
            )
    return internal(fault, error_id)


def internal(cause: Exception, error_id: str) -> JSONResponse:
    """What nobody foresaw: the log gets the exception, the caller the number under which it is."""
    log.error("request_failed", error_id=error_id, exc_info=cause)
    detail = "The server failed. Its log has more under this error_id."
    return problem(500, "internal", detail, fields={"error_id": error_id})


def install(app: FastAPI) -> None:
    """Every error that reaches the app's handlers becomes a problem."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        match error:
            case Fault():
                return of_fault(error, request.state.request_id)
            case HTTPException():
                return _of_framework(request, error)
            case RequestValidationError():
                return _of_validation(error)
            case _:
                return internal(error, request.state.request_id)

    for kind in (Fault, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)


def _of_framework(request: Request, error: HTTPException) -> JSONResponse:
    status = error.status_code
    if status == 404:
        return problem(404, "not_found", "There is no such path.")
    if status == 405:
        allowed = ", ".join(sorted(_methods(request)))
        detail = f"This path takes {allowed}."
        return problem(405, "method_not_allowed", detail, headers={"Allow": allowed})
    code = HTTP_CODES.get(status, "bad_request" if status < 500 else "unavailable")
    return problem(status, code, "The request could not be read.")


def _methods(request: Request) -> set[str]:
    """Of all routes of this path: Starlette names those of the first one only."""
    found: set[str] = set()
    for path, methods in request.app.state.methods:
        if path.match(request.url.path):
            found |= methods
    return found


def _of_validation(error: RequestValidationError) -> JSONResponse:
    """Says where and why, without the input: it may be long, or a secret."""
    errors = error.errors()
    if any(e["loc"][0] == "path" for e in errors):
        return problem(404, "not_found", "There is no such session.")
    found = [
        {"where": ".".join(str(part)[:64] for part in e["loc"])[:256], "problem": _sentence(e)}
        for e in errors[:MAX_ERRORS]
    ]
    detail = "; ".join(f"{e['where']}: {e['problem']}" for e in found[:3])
    return problem(422, "invalid", detail, fields={"errors": found})


def _sentence(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of an operation that may answer with these problems."""
    schema = {"$ref": "#/components/schemas/Problem"}
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {
            "description": _DESCRIPTIONS[status],
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
    found.get(401, {})["headers"] = {
        "WWW-Authenticate": {"schema": {"type": "string"}, "required": True}
    }
    return found


_DESCRIPTIONS = {
    401: "unauthorized: no key, or one that is not known",
    403: "forbidden: dev mode answers this machine's own programs and pages only",
    404: "not_found: no such session of the caller's",
    409: "conflict: not possible in the session's state; nothing was changed",
    413: "too_large: a message over 100,000 characters, or the whole body",
    415: "unsupported_media_type: a body that is not application/json",
    422: "invalid: a value that can never be accepted; nothing was changed",
    429: "at_capacity (the caller's own sessions), queue_full or quota",
    500: "internal",
    503: "at_capacity (the whole cluster) or unavailable",
}
