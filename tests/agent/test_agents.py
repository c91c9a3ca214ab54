from pathlib import Path

import pytest

from agent.agents import PROMPTS, SHIPPED, load_agents, prompt
from agent.faults import SettingsInvalid
from agent.settings import read_yaml
from agent.spec import AgentSpec


def test_the_shipped_agents_load_under_their_file_names() -> None:
    agents = load_agents()
    assert {"default", "demo"} <= set(agents)
    assert all(spec.name == name for name, spec in agents.items())
    assert agents["default"].system_prompt == prompt("default")


def test_the_shipped_default_agent_shows_every_key_with_its_default() -> None:
    tree = read_yaml(SHIPPED / "default.yaml")
    own = {"name", "system_prompt", "model"}
    assert set(tree) == set(AgentSpec.model_fields) - own | {"model", "system_prompt_file"}
    defaults = AgentSpec(name="x", system_prompt="", model="m")
    assert load_agents()["default"].model_dump(exclude=own) == defaults.model_dump(exclude=own)
    for key in ("limits", "approval", "sandbox", "compaction"):
        assert set(tree[key]) == set(type(getattr(defaults, key)).model_fields)


def test_every_prompt_has_text_and_the_prompts_speak_of_the_tools_that_are_there() -> None:
    names = {path.stem for path in PROMPTS.glob("*.md")}
    assert {"default", "demo", "compaction", "seed"} <= names
    assert all(len(prompt(name)) > 100 for name in names)
    for tool in load_agents()["default"].tools:
        assert f"`{tool}`" in prompt("default")
    with pytest.raises(KeyError):
        prompt("nothing")


def test_a_directory_adds_agents_and_replaces_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("Be brief.")
    (tmp_path / "mine.yaml").write_text("system_prompt_file: mine.md\nmodel: a/b\n")
    (tmp_path / "demo.yaml").write_text("system_prompt: Other.\nmodel: c/d\n")
    agents = load_agents([tmp_path])
    assert agents["mine"].system_prompt == "Be brief."
    assert agents["demo"].model == "c/d"
    assert "default" in agents


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("system_prompt: x\nmodel: m\ntempo: 3\n", "tempo"),
        ("system_prompt: x\nmodel: m\nlimits: {max_step: 3}\n", "limits.max_step"),
        ("system_prompt: x\nmodel: m\nlimits: {max_steps: 0}\n", "limits.max_steps"),
        ("system_prompt: x\n", "model"),
        ("system_prompt_file: none.md\nmodel: m\n", "system_prompt_file"),
        ("system_prompt_file: 3\nmodel: m\n", "system_prompt_file"),
        ("system_prompt_file: default.md\nsystem_prompt: x\nmodel: m\n", "system_prompt_file"),
        ("- x", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_what_cannot_be_names_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SettingsInvalid, match=key) as refused:
        load_agents([tmp_path])
    assert "bad.yaml" in refused.value.detail


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="nowhere"):
        load_agents([tmp_path / "nowhere"])
