"""Agents and prompts as files: `configs/agents/*.yaml` and `agent/prompts/*.md`."""

from collections.abc import Sequence
from pathlib import Path

from agent.faults import SettingsInvalid
from agent.settings import checked, read_yaml
from agent.spec import AgentSpec

SHIPPED = Path(__file__).parent.parent / "configs" / "agents"
PROMPTS = Path(__file__).parent / "prompts"

_PROMPTS = {path.stem: path.read_text(encoding="utf-8") for path in PROMPTS.glob("*.md")}
"""Read when imported, like code: the first use is on a running loop, which a file would block."""


def prompt(name: str) -> str:
    """The shipped prompt `agent/prompts/{name}.md`.

    Raises:
        KeyError: there is none.
    """
    return _PROMPTS[name]


def load_agents(dirs: Sequence[Path] = ()) -> dict[str, AgentSpec]:
    """The shipped agents and those in `dirs`, by name; a later directory replaces an agent.

    A file `name.yaml` is an AgentSpec whose prompt may stand in a file: `system_prompt_file` is
    looked up beside the YAML, then among the shipped prompts.

    Raises:
        SettingsInvalid: names the file, and the key that cannot be.
    """
    agents: dict[str, AgentSpec] = {}
    for directory in (SHIPPED, *dirs):
        if not directory.is_dir():
            raise SettingsInvalid(f"{directory}: no such directory of agents")
        for path in sorted(directory.glob("*.yaml")):
            spec = _agent(path)
            agents[spec.name] = spec
    return agents


def _agent(path: Path) -> AgentSpec:
    tree = {"name": path.stem, **read_yaml(path)}
    if "system_prompt_file" in tree:
        if "system_prompt" in tree:
            raise SettingsInvalid(f"{path}: system_prompt_file: there is a system_prompt too")
        tree["system_prompt"] = _prompt_file(path, tree.pop("system_prompt_file"))
    return checked(AgentSpec, tree, str(path))


def _prompt_file(path: Path, name: object) -> str:
    for directory in (path.parent, PROMPTS):
        file = directory / str(name)
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise SettingsInvalid(f"{path}: system_prompt_file: there is no {name}")
