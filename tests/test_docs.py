"""The docs say what the code does: events field by field, calls route by route."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import Route

from agent.events import (
    AnyFact,
    Ask,
    Command,
    Decision,
    Fact,
    PlanItem,
    TextDelta,
    ToolCall,
    ToolOutputDelta,
    Usage,
)
from agent.settings import load
from serve_app.routes import health, router
from serve_app.settings import TroupeSettings

ROOT = Path(__file__).parent.parent
EVENTS = (ROOT / "docs" / "events.md").read_text()
README = (ROOT / "README.md").read_text()

FACTS: tuple[type[Fact], ...] = get_args(get_args(AnyFact)[0])
PARTS: dict[str, list[type[BaseModel]]] = {
    "assistant_message": [ToolCall],
    "model_called": [Usage],
    "approval_requested": [Ask],
    "approval_decided": [Decision],
    "plan_updated": [PlanItem],
}
"""Types that appear inside a fact, and are told where it is."""
COMMON = {"type", "turn", "message_id"}
"""Told once, for all facts."""
HIDDEN = {"spec"}


def sections() -> dict[str, str]:
    """What docs/events.md says, by the event's type."""
    pieces = re.split(r"^### `(\w+)`", EVENTS, flags=re.MULTILINE)[1:]
    return dict(zip(pieces[::2], (piece.split("\n## ")[0] for piece in pieces[1::2]), strict=True))


def type_of(fact: type[Fact]) -> str:
    return fact.model_fields["type"].default


def test_every_event_has_its_section_and_no_section_is_left_over() -> None:
    assert set(sections()) == {*map(type_of, FACTS), "text_delta", "tool_output_delta"}


@pytest.mark.parametrize("fact", FACTS, ids=type_of)
def test_a_section_names_every_field(fact: type[Fact]) -> None:
    text = sections()[type_of(fact)]
    fields = set(fact.model_fields) - COMMON - HIDDEN
    for part in PARTS.get(type_of(fact), []):
        fields |= set(part.model_fields)
    assert {name for name in fields if f"`{name}`" not in text} == set()
    assert not any(f"`{name}`" in text for name in HIDDEN)
    assert text.startswith(" (command)") == issubclass(fact, Command)


@pytest.mark.parametrize(
    ("kind", "delta"), [("text_delta", TextDelta), ("tool_output_delta", ToolOutputDelta)]
)
def test_a_deltas_section_names_every_field(kind: str, delta: Any) -> None:
    assert all(f"`{name}`" in sections()[kind] for name in delta._fields)


@pytest.mark.parametrize("fact", FACTS, ids=type_of)
def test_every_value_of_a_choice_is_told(fact: type[Fact]) -> None:
    text = sections()[type_of(fact)]
    for model in (fact, *PARTS.get(type_of(fact), [])):
        for name, field in model.model_fields.items():
            if name != "type":
                values = [value for value in get_args(field.annotation) if isinstance(value, str)]
                assert [value for value in values if f"`{value}`" not in text] == []


def routes() -> set[tuple[str, str]]:
    found = {
        (method, route.path)
        for route in (*router.routes, *health.routes)
        if isinstance(route, Route | APIRoute)
        for method in route.methods or ()
    }
    assert found
    return found


def calls() -> list[tuple[str, str]]:
    """Method and path of every curl call of the README, with its variables put back in braces."""
    found: list[tuple[str, str]] = []
    joined = README.replace("\\\n", " ")
    for line in re.findall(r"curl [^\n]*", joined):
        path = re.search(r"\$URL(/[^\s'\"?]*)", line)
        assert path, line
        method = re.search(r"-X ([A-Z]+)", line)
        default = "POST" if " -d " in line or "--json" in line else "GET"
        template = path[1].replace("$SESSION", "{session_id}")
        found.append((method[1] if method else default, template))
    return found


def test_the_readmes_calls_are_routes() -> None:
    assert calls()
    assert [call for call in calls() if call not in routes()] == []


def test_the_readmes_table_is_the_routes_table() -> None:
    rows = re.findall(r"^\| `([A-Z]+) (/[^\s`?]*)[^`]*` \|", README, flags=re.MULTILINE)
    told = {(method, path.replace("{id}", "{session_id}")) for method, path in rows}
    assert told == routes()


def test_the_docs_name_only_files_that_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "AGENTS.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(
            r"`((?:agent|actors|serve_app|configs|docs|tests)/[\w./-]+\.\w+)`", page.read_text()
        )
    }
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def commands_of(path: str) -> set[str]:
    found = re.findall(r"\bruff format|\bruff check|\bpyright|\bpytest", (ROOT / path).read_text())
    return set(found)


def test_just_and_ci_run_the_same() -> None:
    assert commands_of(".ci/run") == commands_of("justfile")
    assert len(commands_of("justfile")) == 4


def test_ci_is_a_script_that_bash_reads() -> None:
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True, timeout=5)


def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def on_premises() -> dict[str, Any]:
    """The variant of the file's comments, put in as they say."""
    text = (ROOT / "cluster.yaml").read_text()
    variant = text[text.index("# provider:") :]
    plain = "\n".join(line.removeprefix("#").removeprefix(" ") for line in variant.splitlines())
    whole = cluster() | yaml.safe_load(plain)
    return {k: v for k, v in whole.items() if k not in {"head_node_type", "available_node_types"}}


@pytest.mark.parametrize("config", [cluster(), on_premises()], ids=["aws", "local"])
def test_rays_launcher_takes_the_cluster_file(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["provider"]["type"] == config["provider"]["type"]


def test_the_kubernetes_file_is_one_job_with_a_head_alone() -> None:
    documents = list(yaml.safe_load_all((ROOT / "configs/kuberay/rayjob.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    spec = by_kind["RayJob"]["spec"]["rayClusterSpec"]
    assert "workerGroupSpecs" not in spec
    template = spec["headGroupSpec"]["template"]
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    (head,) = template["spec"]["containers"]
    assert {mount["name"] for mount in head["volumeMounts"]} == volumes
    assert by_kind["Service"]["spec"]["selector"] == template["metadata"]["labels"]


def test_the_kubernetes_file_of_several_nodes_keeps_nothing_that_must_last_on_one() -> None:
    documents = list(yaml.safe_load_all((ROOT / "configs/kuberay/raycluster.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    spec = by_kind["RayCluster"]["spec"]
    assert "redisAddress" in spec["gcsFaultToleranceOptions"]
    head, (workers,) = spec["headGroupSpec"]["template"], spec["workerGroupSpecs"]
    for group in (head, workers["template"]):
        (container,) = group["spec"]["containers"]
        environ = {each["name"]: each["value"] for each in container["env"]}
        settings = load(TroupeSettings, environ=environ)
        assert settings.agent.journal.url.startswith("postgresql://")
        assert settings.agent.storage.url
        assert not any("persistentVolumeClaim" in volume for volume in group["spec"]["volumes"])
    assert by_kind["RayJob"]["spec"]["clusterSelector"] == {"ray.io/cluster": "troupe"}
    assert by_kind["Service"]["spec"]["selector"] == head["metadata"]["labels"]
