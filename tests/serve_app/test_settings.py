from pathlib import Path

import pytest

from agent.faults import SettingsInvalid
from serve_app.settings import ServeSettings, load_settings


def test_the_defaults_in_the_file_are_those_in_the_code() -> None:
    assert load_settings().serve == ServeSettings()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org", ""])
def test_dev_listens_on_loopback_only(tmp_path: Path, host: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"serve: {{dev: true, host: '{host}'}}")
    with pytest.raises(SettingsInvalid, match="loopback only"):
        load_settings([tmp_path / "mine.yaml"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_dev_listens_on_any_loopback(tmp_path: Path, host: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"serve: {{dev: true, host: '{host}', proxy: serve}}")
    assert load_settings([tmp_path / "mine.yaml"]).serve.host == host


def test_haproxy_has_its_hosts(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("serve: {host: '10.0.0.7'}")
    with pytest.raises(SettingsInvalid, match="proxy: serve"):
        load_settings([tmp_path / "mine.yaml"])


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("serve: {colour: red}")
    with pytest.raises(SettingsInvalid, match=r"serve\.colour"):
        load_settings([tmp_path / "mine.yaml"])
