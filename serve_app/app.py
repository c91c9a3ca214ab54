"""The HTTP application: routes, problems, request ids, and the headers of every answer. No Ray."""

import time
from typing import Any
from uuid import uuid4

import structlog
from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.protocol import Sessions
from serve_app import problems
from serve_app.auth import Doorkeeper
from serve_app.room import Room
from serve_app.routes import health, router
from serve_app.settings import ServeSettings

log = structlog.get_logger()

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Answers are one user's and never a page. There is no CORS: browsers of other sites stay out."""


def create_app(sessions: Sessions, settings: ServeSettings) -> FastAPI:
    """
    Raises:
        SettingsInvalid: keys are needed and there is no good keys file.
    """
    app = Api(
        title="Troupe",
        version="1",
        description="LLM agent sessions: durable, streamed.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.sessions = sessions
    app.state.settings = settings
    app.state.doorkeeper = Doorkeeper(settings)
    bearer = HTTPBearer(auto_error=False, description="A key of the keys file")
    app.include_router(router, dependencies=[] if settings.dev else [Depends(bearer)])
    app.include_router(health)
    routes = (*router.routes, *health.routes, *app.routes)
    app.state.methods = [
        (route.path_regex, route.methods or set()) for route in routes if isinstance(route, Route)
    ]
    problems.install(app)
    app.add_middleware(Room, settings=settings)
    app.add_middleware(Envelope)  # around all others
    return app


class Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            template = "#/components/schemas/{model}"
            problem = problems.Problem.model_json_schema(ref_template=template)
            schema["components"]["schemas"] |= problem.pop("$defs") | {"Problem": problem}
            for operations in schema["paths"].values():
                for operation in operations.values():
                    for parameter in operation.get("parameters", ()):
                        _without_null(parameter["schema"])
        return super().openapi()


def _without_null(schema: dict[str, Any]) -> None:
    """A parameter may be absent, which Python calls None; `null` in a URL or a header is a text."""
    kinds = [kind for kind in schema.pop("anyOf", ()) if kind.get("type") != "null"]
    for kind in kinds:
        schema |= kind


class Envelope:
    """Around every request: an id, one line of log, the common headers, and the last resort when
    something raises. Plain ASGI: it must neither buffer nor outlive a stream."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started_at, status = time.monotonic(), 0

        async def send_dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_dressed)
            except ClientDisconnect:
                pass  # in the middle of its body: there is nobody to tell
            except Exception as cause:  # noqa: BLE001 - nothing above would tell the caller anything
                answer = problems.internal(cause, request_id)
                if status == 0:
                    await answer(scope, receive, send_dressed)
            finally:
                _log_answer(scope, status, time.monotonic() - started_at)


def _log_answer(scope: Scope, status: int, took_s: float) -> None:
    """Never the query, a header or a body."""
    route, who = scope.get("route"), scope["state"].get("principal")
    write = log.debug if getattr(route, "path", "") in {"/healthz", "/readyz"} else log.info
    write(
        "request_answered",
        method=scope["method"],
        route=getattr(route, "path", None),
        status=status or None,  # none: the client left before there was one
        duration_ms=round(took_s * 1000),
        user_id=who.user_id if who else None,
        session_id=scope.get("path_params", {}).get("session_id", "")[:64] or None,
    )
