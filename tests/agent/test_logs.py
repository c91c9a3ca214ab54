import json

import pytest
import structlog

from agent import logs


@pytest.fixture(autouse=True)
def configured() -> None:
    structlog.reset_defaults()
    logs.configure()


def test_a_line_is_one_json_object_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    log = structlog.get_logger().bind(session_id="s1")
    key = "sk-" + "a1B2" * 8
    try:
        int(key)
    except ValueError:
        log.exception("call_failed", header=f"Bearer {key}")
    [line] = capsys.readouterr().err.splitlines()
    assert key not in line
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["session_id"]) == ("call_failed", "error", "s1")
    assert "ValueError" in entry["exception"]


def test_local_variables_stay_out(capsys: pytest.CaptureFixture[str]) -> None:
    private = "what the user wrote"
    try:
        len(private) / 0
    except ZeroDivisionError:
        structlog.get_logger().exception("turn_failed")
    assert private not in capsys.readouterr().err


def test_every_line_says_whose_it_is_at_that_time(capsys: pytest.CaptureFixture[str]) -> None:
    whose: dict[str, object] = {}
    logs.configure(lambda: whose)
    structlog.get_logger().info("begun")
    whose = {"session_id": "s1", "epoch": 3}
    structlog.get_logger().info("written")
    structlog.get_logger().bind(session_id="s2").info("told")
    begun, written, told = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert "session_id" not in begun
    assert (written["session_id"], written["epoch"]) == ("s1", 3)
    assert (told["session_id"], told["epoch"]) == ("s2", 3)


def test_debug_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    structlog.get_logger().debug("noise")
    assert capsys.readouterr().err == ""
