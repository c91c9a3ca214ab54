import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from actors.settings import ActorsSettings
from agent.agents import load_agents
from agent.faults import SettingsInvalid
from agent.settings import DEFAULTS, AgentSettings, Section, load, merged, read_yaml


class Root(Section):
    agent: AgentSettings = AgentSettings()
    actors: ActorsSettings = ActorsSettings()
    serve: Any = None
    """Floor 3 tests its own."""


def keys(model: BaseModel, at: str = "") -> set[str]:
    """Every dotted key of a settings model; a mapping by free names is one key."""
    found: set[str] = set()
    for name in type(model).model_fields:
        value = getattr(model, name)
        found |= keys(value, f"{at}{name}.") if isinstance(value, BaseModel) else {f"{at}{name}"}
    return found


def leaves(tree: dict[str, Any], at: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in tree.items():
        found |= (
            leaves(value, f"{at}{name}.") if isinstance(value, dict) and value else {f"{at}{name}"}
        )
    return found


def test_the_default_file_and_the_code_name_the_same_keys() -> None:
    tree = read_yaml(DEFAULTS)
    for section, model in {"agent": AgentSettings(), "actors": ActorsSettings()}.items():
        assert leaves(tree[section]) == keys(model)


def test_the_default_file_says_the_codes_defaults() -> None:
    settings = load(Root, environ={})
    assert settings.agent == AgentSettings()
    assert settings.actors == ActorsSettings()


def test_every_key_of_the_default_file_carries_a_comment() -> None:
    above = ""
    for line in DEFAULTS.read_text().splitlines():
        if key := re.match(r"\s*([\w-]+):", line):
            own = line.partition("#")[2] or above.partition("#")[2]
            assert len(own.strip()) > 10, key[1]
        above = line


@pytest.mark.parametrize("name", ["dev.yaml", "prod.yaml"])
def test_the_shipped_overlays_load(name: str) -> None:
    settings = load(Root, [DEFAULTS.parent / name], environ={})
    assert settings != load(Root, environ={})
    assert settings.agent.default_agent in load_agents()


def test_later_files_win_key_by_key_and_the_environment_wins_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("actors: {max_sessions: 7, warm: {min: 3}}\nagent: {model: {max_retries: 5}}")
    second.write_text("actors: {max_sessions: 8}")
    environ = {
        "TROUPE__ACTORS__PAGE_WAIT_S": "2.5",
        "TROUPE__AGENT__DEFAULT_MODEL": "openai/x",
        "TROUPE__AGENT__MODEL__WINDOWS": "{openai/x: 4096}",
        "TROUPE__AGENT__MODEL__API_BASE": "null",
        "TROUPE_OTHER": "is not ours",
        "PATH": "/bin",
    }
    settings = load(Root, [first, second], environ)
    assert settings.actors.max_sessions == 8
    assert settings.actors.warm.min == 3
    assert settings.actors.warm.max_uses == ActorsSettings().warm.max_uses
    assert settings.actors.page_wait_s == 2.5
    assert settings.agent.model.max_retries == 5
    assert settings.agent.default_model == "openai/x"
    assert settings.agent.model.windows == {"openai/x": 4096}
    assert settings.agent.model.api_base is None


def test_merging_replaces_all_but_mappings_and_changes_neither_side() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    over = {"a": {"c": [3]}, "d": None, "f": {"g": 1}}
    assert merged(base, over) == {"a": {"b": 1, "c": [3]}, "d": None, "f": {"g": 1}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("actors: {max_session: 7}", "actors.max_session"),
        ("agent: {model: {retries: 7}}", "agent.model.retries"),
        ("agent: {model: {prices: {m: {input_usd_per_mtok: 1}}}}", "output_usd_per_mtok"),
        ("actor: {}", "actor"),
        ("actors: {page_wait_s: 16}", "actors.page_wait_s"),
        ("actors: {max_sessions: many}", "actors.max_sessions"),
        ("actors: []", "actors"),
        ("just a text", "mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_a_key_that_cannot_be_is_refused_with_its_name_and_file(
    tmp_path: Path, text: str, key: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SettingsInvalid, match=re.escape(key)) as refused:
        load(Root, [file], environ={})
    assert "mine.yaml" in refused.value.detail


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="cannot be read"):
        load(Root, [tmp_path / "none.yaml"], environ={})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsInvalid, match="not YAML"):
        load(Root, [tmp_path / "binary.yaml"], environ={})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TROUPE__ACTORS__MAX_SESSION", "7", "actors.max_session"),
        ("TROUPE__ACTORS__MAX_SESSIONS", "0", "actors.max_sessions"),
        ("TROUPE__ACTORS__QUOTAS", "{", "TROUPE__ACTORS__QUOTAS"),
    ],
)
def test_a_variable_that_cannot_be_is_refused(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsInvalid, match=said):
        load(Root, environ={name: value})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        AgentSettings().default_agent = "x"  # type: ignore[misc]
