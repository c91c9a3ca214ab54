"""HTTP v1. A handler only enqueues or reads.

Serve cancels whatever a handler started, recursively, when its client leaves: so nothing here may be
half of a change.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from actors.protocol import (
    Accepted,
    AnyCommand,
    Close,
    Compact,
    Decide,
    Interrupt,
    Invalid,
    Open,
    Principal,
    QueueFull,
    Seed,
    SendMessage,
    Sessions,
    SwitchModel,
    TooLarge,
    Truncate,
    Unavailable,
    Undo,
)
from agent.events import Cursor
from serve_app import bodies
from serve_app.auth import Doorkeeper
from serve_app.problems import UnsupportedMediaType, documented
from serve_app.room import Place
from serve_app.settings import ServeSettings
from serve_app.stream import EventStream

BODY_WAIT_S = 60.0
"""For a whole body: a slow line takes a few seconds for the largest; nobody holds a request open."""
READY_WAIT_S = 5.0
"""A cluster that needs longer to say that it is ready is not."""


class GuardedRoute(APIRoute):
    """Looks at the key first, then at the body, then lets FastAPI at both: whoever has no key
    makes the server read nothing and learns nothing."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            doorkeeper: Doorkeeper = request.app.state.doorkeeper
            request.state.principal = await doorkeeper.principal(request.headers)
            if request.method == "POST":
                request = BodyRequest(request.scope, request.receive)
                await request.read()
            return await handle(request)

        return guarded


class BodyRequest(Request):
    """A request whose body is small enough, JSON, and already there."""

    _raw: bytes = b""
    _value: Any = None

    async def read(self) -> None:
        """
        Raises:
            TooLarge, UnsupportedMediaType, Invalid, HTTPException (408)
        """
        limit = self.app.state.settings.max_body_bytes
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(BODY_WAIT_S):
                received = await self._received(limit)
        except TimeoutError:
            raise HTTPException(408) from None
        if received:
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise UnsupportedMediaType("Send the body as `Content-Type: application/json`.")
            self._raw = received
            self._value = bodies.parsed(received)

    async def _received(self, limit: int) -> bytes:
        received = bytearray()
        async for chunk in self.stream():
            received += chunk
            # Over the limit the server reads on and forgets; hanging up would lose the answer.
            if len(received) > limit:
                raise _too_large(limit)
        return bytes(received)

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"A body has at most {limit} bytes.", limit=limit)


class Call:
    """What every handler under /v1 has."""

    def __init__(self, request: Request) -> None:
        self.sessions: Sessions = request.app.state.sessions
        self.settings: ServeSettings = request.app.state.settings
        self.who: Principal = request.state.principal
        self.place: Place = request.state.place


SessionId = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{1,64}$")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern="^[!-~]{1,128}$",
        description="The same as `message_id` in the body; both and different is 422",
    ),
]


class Post(Call):
    """A call that may be repeated under one key."""

    def __init__(self, request: Request, idempotency_key: str | None) -> None:
        super().__init__(request)
        self.wants_events = _wants_events(request.headers.get("accept", ""))
        self._key_header = idempotency_key

    def key(self, body: bodies.CommandIn) -> str | None:
        """
        Raises:
            Invalid: body and header have one each, and they differ.
        """
        if self._key_header is None:
            return body.message_id
        if body.message_id not in {None, self._key_header}:
            raise Invalid("`message_id` and `Idempotency-Key` differ: send one.")
        return self._key_header

    async def submit(self, session_id: str, command: AnyCommand) -> Accepted:
        return await self.sessions.submit(self.who, session_id, command)


# A dependency that is not async costs a thread's turn (FastAPI 0.165).
async def _call(request: Request) -> Call:
    return Call(request)


async def _post(request: Request, idempotency_key: IdempotencyKey = None) -> Post:
    return Post(request, idempotency_key)


Read = Annotated[Call, Depends(_call)]
Written = Annotated[Post, Depends(_post)]
CURSOR_PATTERN = r"^[0-9]{1,18}\.[0-9]{1,18}\.[0-9]{1,18}$"

READ = documented(401, 403, 404, 422, 429, 500, 503)
COMMAND = documented(401, 403, 404, 409, 413, 415, 422, 429, 500, 503)
SSE: dict[str, Any] = {
    "description": "Server-sent events: `id` a cursor, `event` the type, `data` one line of JSON",
    "content": {
        "text/event-stream": {
            "schema": {
                "description": "One event",
                "type": "object",
                "properties": {
                    "id": {"type": "string", "pattern": CURSOR_PATTERN},
                    "event": {"type": "string", "pattern": "^[a-z_]+$"},
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"type": "object", "required": ["turn"]},
                    },
                    "retry": {"type": "integer"},
                },
            }
        }
    },
}

router = APIRouter(prefix="/v1", route_class=GuardedRoute)
health = APIRouter()


class EventsQuery(BaseModel):
    after: str | None = Field(default=None, pattern=CURSOR_PATTERN)
    turn: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="Only this turn's, to its turn_ended"
    )
    follow: Literal["true", "false"] = Field(default="true", description="false: stop at the head")


@router.post(
    "/sessions",
    status_code=201,
    responses=documented(401, 403, 409, 413, 415, 422, 429, 500, 503),
    tags=["sessions"],
)
async def open_session(
    call: Written,
    response: Response,
    body: bodies.OpenIn | None = None,
    x_hf_token: Annotated[
        str | None,
        Header(pattern="^[!-~]{1,1024}$", description="For tools; never kept in plain text"),
    ] = None,
) -> bodies.SessionOut:
    body = body or bodies.OpenIn()
    view = await call.sessions.open(
        call.who,
        Open(
            agent=body.agent,
            model=body.model,
            title=body.title,
            seed_messages=tuple(body.seed_messages),
            metadata=body.metadata,
            user_token=x_hf_token,
            message_id=call.key(body),
        ),
    )
    response.headers["Location"] = f"/v1/sessions/{view.session_id}"
    return bodies.SessionOut.of(view)


@router.get("/sessions", responses=documented(401, 403, 422, 429, 500, 503), tags=["sessions"])
async def list_sessions(
    call: Read,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[
        str | None,
        Query(max_length=512, description="The `next` of the page before"),
    ] = None,
) -> bodies.SessionsOut:
    """The caller's own, newest first."""
    page = await call.sessions.owned(call.who, limit=limit, after=after)
    return bodies.SessionsOut.model_validate(page)


@router.get("/sessions/{session_id}", responses=READ, tags=["sessions"])
async def get_session(call: Read, session_id: SessionId) -> bodies.SessionOut:
    return bodies.SessionOut.of(await call.sessions.view(call.who, session_id))


@router.delete(
    "/sessions/{session_id}",
    status_code=204,
    responses=READ | documented(409),
    tags=["sessions"],
)
async def delete_session(call: Read, session_id: SessionId) -> None:
    """Ends everything the session runs; removes its records, workspace and trajectory."""
    await call.sessions.delete(call.who, session_id)


@router.post(
    "/sessions/{session_id}/messages",
    status_code=202,
    response_model=bodies.TurnAccepted,
    responses=COMMAND | {200: SSE},
    tags=["turns"],
)
async def send_message(
    call: Written,
    session_id: SessionId,
    body: bodies.MessageIn,
) -> Any:
    """Opens a turn. With `Accept: text/event-stream` the answer is that turn's events, or 202 where
    the session has as many readers as it may."""
    command = SendMessage(text=body.checked_text(), message_id=call.key(body))
    if call.wants_events:
        call.place.becomes_stream()
    accepted = await call.submit(session_id, command)
    if not call.wants_events:
        return bodies.TurnAccepted.model_validate(accepted)
    # Just before the message's own fact. Epoch 0 never shows anything, so only the seq counts.
    before = Cursor(seq=max(0, Cursor.parse(accepted.cursor).seq - 1))
    pages = call.sessions.pages(call.who, session_id, before, turn=accepted.turn)
    try:
        return await EventStream.opened(pages, call.settings)
    except QueueFull:
        # The message is taken, and a refusal would say that it is not: its events can be read later.
        return bodies.TurnAccepted.model_validate(accepted)


def _wants_events(accept: str) -> bool:
    """Named outright: `*/*` means JSON."""
    kinds = [part.partition(";") for part in accept.lower().split(",")]
    return any(
        kind.strip() == "text/event-stream" and options.replace(" ", "") not in {"q=0", "q=0.0"}
        for kind, _, options in kinds
    )


@router.get("/sessions/{session_id}/messages", responses=READ, tags=["sessions"])
async def get_messages(call: Read, session_id: SessionId) -> bodies.MessagesOut:
    """The conversation in OpenAI chat format, without the system prompt."""
    return bodies.MessagesOut(data=await call.sessions.messages(call.who, session_id))


@router.get(
    "/sessions/{session_id}/events",
    status_code=200,
    response_class=EventStream,
    responses=READ | {200: SSE},
    tags=["turns"],
)
async def get_events(
    call: Read,
    session_id: SessionId,
    query: Annotated[EventsQuery, Query()],
    last_event_id: Annotated[
        str | None,
        Header(pattern=CURSOR_PATTERN, description="Wins over `after`"),
    ] = None,
) -> EventStream:
    """Every fact after the cursor once and in order, and previews of those to come. The answer is
    bounded in time and size; when it ends with the comment `reconnect`, come back with the last id."""
    call.place.becomes_stream()
    view = await call.sessions.view(call.who, session_id)
    follow = query.follow == "true"
    cursor = Cursor.parse(last_event_id or query.after or str(Cursor()))
    if cursor.seq > Cursor.parse(view.cursor).seq:
        raise Invalid("The cursor is ahead of this session: read it from its beginning.")
    pages = call.sessions.pages(call.who, session_id, cursor, turn=query.turn, follow=follow)
    return await EventStream.opened(pages, call.settings, follow=follow)


@router.post("/sessions/{session_id}/approvals", status_code=202, responses=COMMAND, tags=["turns"])
async def decide(
    call: Written,
    session_id: SessionId,
    body: bodies.ApprovalsIn,
) -> bodies.TurnAccepted:
    """Opens a turn. Calls without a decision stay pending."""
    command = Decide(
        decisions=tuple(bodies.decision_of(answer) for answer in body.decisions),
        message_id=call.key(body),
    )
    accepted = await call.submit(session_id, command)
    return bodies.TurnAccepted.model_validate(accepted)


def _add_plain_command(
    name: str, build: Callable[[str | None], AnyCommand], description: str
) -> None:
    """`POST .../{name}` for a command that has nothing but its key."""

    async def carry_out(
        call: Written,
        session_id: SessionId,
        body: bodies.CommandIn | None = None,
    ) -> bodies.CommandAccepted:
        key = call.key(body or bodies.CommandIn())
        return await _command(call.submit(session_id, build(key)))

    router.add_api_route(
        f"/sessions/{{session_id}}/{name}",
        carry_out,
        methods=["POST"],
        name=name,
        description=description,
        status_code=202,
        responses=COMMAND,
        tags=["turns"],
    )


_add_plain_command(
    "interrupt", lambda key: Interrupt(message_id=key), "Ends the running turn; queued ones go on."
)
_add_plain_command(
    "undo", lambda key: Undo(message_id=key), "Takes the last user message and all after it away."
)
_add_plain_command(
    "compact", lambda key: Compact(message_id=key), "Summarises the older conversation."
)
_add_plain_command(
    "close", lambda key: Close(message_id=key), "For ever: afterwards only reads and delete."
)


@router.post("/sessions/{session_id}/truncate", status_code=202, responses=COMMAND, tags=["turns"])
async def truncate(
    call: Written,
    session_id: SessionId,
    body: bodies.TruncateIn,
) -> bodies.CommandAccepted:
    """Cuts the conversation just before a user message."""
    command = Truncate(
        user_message_index=body.user_message_index,
        message_id=call.key(body),
    )
    return await _command(call.submit(session_id, command))


@router.post("/sessions/{session_id}/model", status_code=202, responses=COMMAND, tags=["turns"])
async def switch_model(
    call: Written,
    session_id: SessionId,
    body: bodies.ModelIn,
) -> bodies.CommandAccepted:
    """Uses another model from the next model call on."""
    command = SwitchModel(model=body.model, message_id=call.key(body))
    return await _command(call.submit(session_id, command))


async def _command(accepting: Awaitable[Accepted]) -> bodies.CommandAccepted:
    return bodies.CommandAccepted.model_validate(await accepting)


@router.post("/sessions/{session_id}/seed", status_code=202, responses=COMMAND, tags=["turns"])
async def seed(
    call: Written,
    session_id: SessionId,
    body: bodies.SeedIn,
) -> bodies.SeedAccepted:
    """Tells the session about earlier messages. Malformed ones are dropped and counted."""
    command = Seed(messages=tuple(body.messages), message_id=call.key(body))
    accepted = await call.submit(session_id, command)
    return bodies.SeedAccepted.model_validate(accepted)


@router.get(
    "/sessions/{session_id}/trajectory",
    responses=READ
    | {200: {"description": "The trajectory", "content": {"application/json": {"schema": {}}}}},
    tags=["sessions"],
)
async def get_trajectory(call: Read, session_id: SessionId) -> Response:
    trajectory = await call.sessions.trajectory(call.who, session_id)
    # Many megabytes for a long session: not on the loop that everybody's streams run on.
    text = await asyncio.to_thread(json.dumps, trajectory)
    return Response(text, media_type="application/json")


@router.get("/capacity", responses=documented(401, 403, 429, 500, 503), tags=["cluster"])
async def get_capacity(call: Read) -> bodies.CapacityOut:
    return bodies.CapacityOut.model_validate(
        await call.sessions.capacity(call.who), from_attributes=True
    )


@health.get("/healthz", tags=["cluster"])
async def healthz() -> bodies.HealthOut:
    """Whether this process answers."""
    return bodies.HealthOut(status="ok")


@health.get("/readyz", responses=documented(429, 500, 503), tags=["cluster"])
async def readyz(request: Request) -> bodies.HealthOut:
    """Whether sessions can be opened."""
    sessions: Sessions = request.app.state.sessions
    try:
        async with asyncio.timeout(READY_WAIT_S):
            ready = await sessions.ready()
    except TimeoutError:
        ready = False
    if not ready:
        raise Unavailable("Sessions cannot be opened at the moment.")
    return bodies.HealthOut(status="ready")
