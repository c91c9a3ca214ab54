"""Who may call."""

import asyncio
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import yaml
from starlette.datastructures import Headers

from agent.faults import SettingsInvalid
from serve_app.app import create_app
from serve_app.auth import Doorkeeper, new_key
from serve_app.problems import Unauthorized
from serve_app.settings import ServeSettings
from tests.serve_app.asking import is_problem, opened
from tests.serve_app.conftest import client
from tests.serve_app.serving import served
from tests.support.sessions import MemorySessions


def bearer(token: str) -> Headers:
    return Headers({"authorization": f"Bearer {token}"})


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer " + "x" * 5000,
        "Basic YWxpY2U6eA==",
        "Bearer \xff\xfe",
        "bearer  two",
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/sessions"), ("POST", "/v1/sessions"), ("GET", "/v1/capacity")]
)
async def test_without_a_known_key_there_is_401(
    url: str, method: str, path: str, authorization: str | None
) -> None:
    headers = {"Authorization": authorization.encode("latin-1")} if authorization else {}
    async with httpx.AsyncClient(base_url=url, headers=headers) as http:
        # Garbage behind a missing key is not even looked at.
        answer = await http.request(method, path, content=b"{garbage")
    is_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_every_call_under_v1_needs_a_key(url: str) -> None:
    async with client(url, None) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
        for path, operations in paths.items():
            for method in operations:
                answer = await http.request(method, path.replace("{session_id}", "s-1"))
                if path.startswith("/v1/"):
                    is_problem(answer, 401, "unauthorized")
                else:
                    assert answer.status_code == 200


async def test_the_scheme_is_read_in_any_case(url: str, tokens: dict[str, str]) -> None:
    headers = {"Authorization": f"bEARER {tokens['bob']}"}
    async with httpx.AsyncClient(base_url=url, headers=headers) as http:
        assert (await http.get("/v1/sessions")).status_code == 200


async def test_the_key_names_the_user_and_no_body_can(
    alice: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    is_problem(await alice.post("/v1/sessions", json={"user_id": "bob"}), 422, "invalid")
    session_id = await opened(alice)
    assert sessions.all[session_id].user_id == "alice"


def test_a_new_key_is_stored_hashed_only() -> None:
    first, second = new_key("alice"), new_key("alice")
    assert first.token != second.token
    assert len(first.token) >= 43
    assert first.entry.model_dump() == {
        "user": "alice",
        "sha256": sha256(first.token.encode()).hexdigest(),
    }


@pytest.mark.parametrize("user", ["", "a b", "a\n", "x" * 65, "../a"])
def test_a_user_has_a_plain_name(user: str) -> None:
    with pytest.raises(SettingsInvalid, match="user's name"):
        new_key(user)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: [{user: a, sha256: short}]", "keys.0.sha256"),
        ("keys: [{user: 'a b', sha256: " + "0" * 64 + "}]", "keys.0.user"),
        ("keys: [{user: a, key: plain}]", "keys.0"),
        ("[1]", "no mapping"),
        ("{", "not YAML"),
        ("#" * (1024**2 + 1), "larger"),
    ],
)
def test_a_bad_keys_file_stops_the_start(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(SettingsInvalid, match=says):
        create_app(MemorySessions(), ServeSettings(keys_file=tmp_path / "keys.yaml"))


def test_without_keys_and_without_dev_nothing_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="troupe key"):
        create_app(MemorySessions(), ServeSettings(keys_file=tmp_path / "none.yaml"))


async def test_a_changed_keys_file_counts_from_the_next_look(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    doorkeeper = Doorkeeper(settings, reload_every_s=0)
    assert (await doorkeeper.principal(bearer(tokens["alice"]))).user_id == "alice"
    carol = new_key("carol")
    settings.keys_file.write_text(yaml.safe_dump({"keys": [carol.entry.model_dump()]}))
    assert (await doorkeeper.principal(bearer(carol.token))).user_id == "carol"
    with pytest.raises(Unauthorized):
        await doorkeeper.principal(bearer(tokens["alice"]))
    settings.keys_file.write_text("half an ed: [")
    assert (await doorkeeper.principal(bearer(carol.token))).user_id == "carol"
    settings.keys_file.unlink()
    assert (await doorkeeper.principal(bearer(carol.token))).user_id == "carol"


async def test_dev_mode_knows_one_user_and_no_keys(tmp_path: Path) -> None:
    settings = ServeSettings(dev=True, keys_file=tmp_path / "none.yaml")
    async with served(MemorySessions(), settings) as url, client(url, "any key") as http:
        answer = await http.post("/v1/sessions")
    assert answer.json()["user_id"] == "dev"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "["},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
async def test_dev_mode_answers_no_page_of_another_site(headers: dict[str, str]) -> None:
    sessions = MemorySessions()
    async with served(sessions, ServeSettings(dev=True)) as url, client(url, None) as http:
        answer = await http.post("/v1/sessions", headers=headers)
        is_problem(answer, 403, "forbidden")
        own = await http.post("/v1/sessions", headers={"Origin": url})
        assert own.status_code == 201
    assert len(sessions.all) == 1


async def test_concurrent_requests_are_told_apart(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    answers = await asyncio.gather(*(http.post("/v1/sessions") for http in (alice, bob, alice)))
    assert [a.json()["user_id"] for a in answers] == ["alice", "bob", "alice"]
