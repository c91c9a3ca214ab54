"""The rules of the house, read off the source: floors, names, sizes, errors, environment, faults.

Every rule is a function from one module to the lines that break it, and each is shown a module that
breaks it, so that a rule which stopped to see anything fails too.
"""

import ast
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from agent.faults import Fault

ROOT = Path(__file__).parent.parent
FLOORS = ("agent", "actors", "serve_app")
WEB = {"fastapi", "starlette", "uvicorn"}

RAY_FILES = {
    "actors/client.py",
    "actors/manager.py",
    "actors/node.py",
    "actors/node_journal.py",
    "actors/session.py",
    "actors/gateway.py",
    "actors/bulk.py",
    "actors/rayhost.py",
    "actors/remote.py",
    "serve_app/cluster.py",
    "serve_app/deployment.py",
}

EDGE_SEES = {
    "actors.protocol",
    "actors.settings",
    "agent.events",
    "agent.faults",
    "agent.settings",
}
"""What every module of floor 3 may import from below."""
COMPOSITION = ("serve_app/cli", "serve_app/cluster.py", "serve_app/deployment.py")
"""Where the floors are put together: these see floor 1 and `actors.client` too."""
DEPLOYS = {"serve_app/deployment.py": "actors.gateway"}
"""The one file that runs floor 2's Serve application beside the edge's."""

ENVIRONMENT_READERS = {
    "agent/settings.py": "the one loader of settings",
    "agent/model/litellm_adapter.py": "litellm takes its switches from the environment at import",
    "agent/model/endpoints.py": "keys and addresses of providers are in the names that litellm reads",
    "agent/vault.py": "its key is a secret: settings name the variable and every process reads its own",
    "serve_app/cluster.py": "Ray takes its switches from the environment at import",
}
"""And `serve_app/cli*.py`, the terminal's own surroundings."""

CATCH_ALL = {
    "agent/faults.py": "boundary(): foreign exceptions become one class, once",
    "serve_app/cluster.py": "Ray raises a bare Exception where its start takes too long",
    "serve_app/app.py": "the last resort: whatever reaches the edge is logged and becomes a 500 problem",
    "agent/tools/router.py": "whatever a tool raises is that call's `error` result",
    "agent/model/litellm_adapter.py": "litellm raises anything; it becomes one of ours, once",
    "actors/activation.py": "a defect of ours ends the turn; an open turn would hang for ever",
    "actors/recovery.py": "a session that cannot be brought back does not keep the others from it",
    "actors/housing.py": "a session that cannot leave in order still gives its slot back",
    "actors/idling.py": "a session that cannot be sent away does not keep the others",
    "actors/plane.py": "a defect in one call must not end the process's other sessions",
    "actors/rolling.py": "a session that cannot be moved does not keep the others from it",
    "actors/node.py": "a look of the reaper that fails must not be the last",
}
"""Files that may say `except Exception`, each with its reason."""
ENDS_A_PROCESS = {"agent/sandbox/warden.py": "a forked child ends in place, whatever happened"}
"""Files that may swallow BaseException."""

BANNED_SUFFIXES = (
    "Manager",
    "Service",
    "Handler",
    "Helper",
    "Processor",
    "Util",
    "Utils",
    "Info",
    "Impl",
)
MAX_FUNCTION_LINES = 70

CODES = {
    "Fault": "fault",
    "ModelFault": "model_failed",
    "ModelAuth": "model_auth",
    "ModelRateLimited": "model_rate_limited",
    "ModelBusy": "model_busy",
    "ModelUnavailable": "model_unavailable",
    "ModelLost": "model_lost",
    "ModelTimeout": "model_timeout",
    "ModelCut": "model_cut",
    "ModelRefused": "model_refused",
    "ContextOverflow": "context_overflow",
    "SandboxUnavailable": "sandbox_unavailable",
    "WorkspaceRefused": "workspace_refused",
    "SnapshotFailed": "snapshot_failed",
    "JournalFault": "journal_failed",
    "Fenced": "fenced",
    "NoSuchSession": "not_found",
    "SessionExists": "session_exists",
    "MessageKnown": "message_known",
    "SettingsInvalid": "settings_invalid",
    "NotFound": "not_found",
    "Conflict": "conflict",
    "TooLarge": "too_large",
    "Invalid": "invalid",
    "AtCapacity": "at_capacity",
    "QuotaExceeded": "quota",
    "QueueFull": "queue_full",
    "Unavailable": "unavailable",
    "Moved": "moved",
    "AlreadyRunning": "already_running",
    "CannotStart": "cannot_start",
    "Unauthorized": "unauthorized",
    "Forbidden": "forbidden",
    "UnsupportedMediaType": "unsupported_media_type",
}
"""Clients branch on these for ever: a change here is a change of the API."""
SAME_CODE = {"NoSuchSession", "NotFound"}
"""One condition, said by the journal and by the floor above it."""


class Module(NamedTuple):
    path: str
    """Relative to the repository, with slashes."""
    tree: ast.Module

    @property
    def floor(self) -> str:
        return self.path.split("/")[0]


def modules(*folders: str) -> list[Module]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        Module(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in paths
    ]


HOUSE = modules(*FLOORS)
TESTS = modules("tests")


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Absolute dotted names; `from agent import events` counts as `agent.events`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.path.removesuffix(".py").split("/")[: -node.level or None]
            base = ".".join([*package, node.module or ""]) if node.level else node.module or ""
            base = base.strip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if _is_module(whole) else base


def _is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def floors_are_crossed(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        top = name.split(".")[0]
        if top == "ray" and module.path not in RAY_FILES:
            yield f"{module.path}:{line}: ray belongs in the files of RAY_FILES"
        if top in WEB and module.floor != "serve_app":
            yield f"{module.path}:{line}: {top} belongs to serve_app"
        if top in {*FLOORS, "tests", "bench"} and not _may_import(module, name):
            yield f"{module.path}:{line}: {module.floor} may not import {name}"


def _may_import(module: Module, name: str) -> bool:
    match module.floor:
        case "agent":
            return within(name, "agent")
        case "actors":
            return within(name, "agent") or within(name, "actors")
        case _:
            allowed = {"serve_app", *EDGE_SEES}
            if module.path.startswith(COMPOSITION):
                allowed |= {"agent", "actors.client"}
            if module.path in DEPLOYS:
                allowed.add(DEPLOYS[module.path])
            return any(within(name, one) for one in allowed)


def names_are_banned(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and node.name != "SessionManager":
            name = node.name.strip("_")
            if name.endswith(BANNED_SUFFIXES) or name.startswith("Base"):
                yield f"{module.path}:{node.lineno}: class {node.name} says nothing about what it is"


def functions_are_long(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if n_lines > MAX_FUNCTION_LINES:
                yield f"{module.path}:{node.lineno}: {node.name} has {n_lines} lines"


def errors_are_swallowed(module: Module) -> Iterator[str]:
    for line, name, raised_again in _caught(module.tree):
        if name in {"BaseException", ""}:
            if not raised_again and module.path not in ENDS_A_PROCESS:
                yield f"{module.path}:{line}: who catches everything tidies up and raises it again"
        elif name == "Exception" and module.path not in CATCH_ALL:
            yield f"{module.path}:{line}: `except Exception` needs a place in CATCH_ALL"


def _caught(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line, class and whether the last thing done is a bare `raise`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            last = node.body[-1]
            again = isinstance(last, ast.Raise) and last.exc is None
            yield from ((node.lineno, ast.unparse(kind) if kind else "", again) for kind in kinds)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            yield from ((node.lineno, ast.unparse(kind), False) for kind in node.args)


def the_environment_is_read(module: Module) -> Iterator[str]:
    if module.path in ENVIRONMENT_READERS or module.path.startswith("serve_app/cli"):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}:
            yield f"{module.path}:{node.lineno}: settings come from agent.settings.load"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in {"environ", "getenv"}:
                    yield f"{module.path}:{node.lineno}: settings come from agent.settings.load"


def skips_are_silent(module: Module) -> Iterator[str]:
    marks = ("mark.skip", "mark.skipif", "mark.xfail")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(marks):
            yield from _without_reason(module, node)
        elif isinstance(node, ast.Call) and ast.unparse(node) in {
            "pytest.skip()",
            "pytest.xfail()",
        }:
            yield f"{module.path}:{node.lineno}: a skip says why"


def _without_reason(module: Module, mark: ast.Attribute) -> Iterator[str]:
    calls = [n for n in ast.walk(module.tree) if isinstance(n, ast.Call) and n.func is mark]
    reasons = [key for call in calls for key in call.keywords if key.arg == "reason"]
    if not any(ast.unparse(key.value) not in {"''", "None"} for key in reasons):
        yield f"{module.path}:{mark.lineno}: {mark.attr} without a reason"


Rule = Callable[[Module], Iterator[str]]
RULES: dict[Rule, list[Module]] = {
    floors_are_crossed: HOUSE,
    names_are_banned: HOUSE,
    functions_are_long: HOUSE,
    errors_are_swallowed: HOUSE,
    the_environment_is_read: HOUSE,
    skips_are_silent: TESTS,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Rule) -> None:
    assert [line for module in RULES[rule] for line in rule(module)] == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (floors_are_crossed, "agent/x.py", "import ray"),
        (floors_are_crossed, "agent/x.py", "from ray.serve import run"),
        (floors_are_crossed, "agent/x.py", "def f():\n    from actors.protocol import Sessions"),
        (floors_are_crossed, "agent/x.py", "from fastapi import FastAPI"),
        (floors_are_crossed, "actors/x.py", "import serve_app"),
        (floors_are_crossed, "actors/x.py", "import ray"),
        (floors_are_crossed, "actors/x.py", "from tests.support import x"),
        (floors_are_crossed, "serve_app/x.py", "import actors"),
        (floors_are_crossed, "serve_app/x.py", "from agent.journal import Journal"),
        (floors_are_crossed, "serve_app/x.py", "from agent import journal"),
        (floors_are_crossed, "serve_app/cli_x.py", "from actors.ledger import Ledger"),
        (floors_are_crossed, "serve_app/cluster.py", "from actors.gateway import APP"),
        (names_are_banned, "agent/x.py", "class ToolManager: ..."),
        (names_are_banned, "agent/x.py", "class BaseTool: ..."),
        (names_are_banned, "agent/x.py", "class _PathUtils: ..."),
        (functions_are_long, "agent/x.py", "def f():\n" + "    x = 1\n" * 70),
        (errors_are_swallowed, "agent/x.py", "try: f()\nexcept: pass"),
        (errors_are_swallowed, "agent/x.py", "try: f()\nexcept (OSError, Exception): pass"),
        (errors_are_swallowed, "agent/faults.py", "try: f()\nexcept BaseException: pass"),
        (errors_are_swallowed, "agent/x.py", "try: f()\nexcept BaseException: raise E"),
        (errors_are_swallowed, "agent/x.py", "with contextlib.suppress(Exception): f()"),
        (the_environment_is_read, "agent/x.py", "import os\nx = os.environ['X']"),
        (the_environment_is_read, "agent/x.py", "from os import getenv"),
        (skips_are_silent, "tests/x.py", "@pytest.mark.skip\ndef test_x(): ..."),
        (skips_are_silent, "tests/x.py", "@pytest.mark.xfail(strict=True)\ndef test_x(): ..."),
        (skips_are_silent, "tests/x.py", "pytest.skip()"),
    ],
)  # fmt: skip
def test_a_rule_sees_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    assert list(rule(Module(path, ast.parse(source))))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (floors_are_crossed, "actors/client.py", "import ray"),
        (floors_are_crossed, "actors/x.py", "from agent import journal"),
        (floors_are_crossed, "serve_app/x.py", "from agent import events\nfrom serve_app.x import y"),
        (floors_are_crossed, "serve_app/cli_x.py", "from actors.client import connect"),
        (names_are_banned, "actors/manager.py", "class SessionManager: ..."),
        (functions_are_long, "agent/x.py", "def f():\n" + "    x = 1\n" * 69),
        (errors_are_swallowed, "agent/faults.py", "try: f()\nexcept Exception: raise"),
        (errors_are_swallowed, "agent/x.py", "try: f()\nexcept BaseException:\n    g()\n    raise"),
        (skips_are_silent, "tests/x.py", "pytest.skip('no kernel for it')"),
        (skips_are_silent, "tests/x.py", "@pytest.mark.xfail(reason='known')\ndef test_x(): ..."),
    ],
)  # fmt: skip
def test_a_rule_leaves_the_rest_alone(rule: Rule, path: str, source: str) -> None:
    assert list(rule(Module(path, ast.parse(source)))) == []


def test_every_floor_is_looked_at() -> None:
    assert {module.floor for module in HOUSE} == set(FLOORS)


def test_lists_name_no_file_that_catches_nothing() -> None:
    """An entry that is not needed any more would let the next one in unseen."""
    catching = {m.path for m in HOUSE if any(name == "Exception" for _, name, _ in _caught(m.tree))}
    present = {path for path in CATCH_ALL if (ROOT / path).is_file()}
    assert present - catching == set()


def fault_classes() -> dict[str, type[Fault]]:
    """Every Fault of the house, found by its bases' names, so that only modules with one are imported."""
    bases: dict[str, tuple[str, set[str]]] = {}
    for module in HOUSE:
        dotted = module.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                parents = {ast.unparse(base).split(".")[-1] for base in node.bases}
                bases[f"{dotted}:{node.name}"] = (node.name, parents)
    known = {"Fault"}
    while True:
        more = {name for name, parents in bases.values() if parents & known} - known
        if not more:
            break
        known |= more
    found = [key.split(":") for key, (name, _) in bases.items() if name in known]
    return {name: getattr(importlib.import_module(dotted), name) for dotted, name in found}


def test_every_fault_has_its_listed_code() -> None:
    assert {name: kind.code for name, kind in fault_classes().items()} == CODES


def test_codes_are_unique() -> None:
    codes = [code for name, code in CODES.items() if name not in SAME_CODE]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("name", CODES)
def test_a_fault_survives_pickling(name: str) -> None:
    fault = fault_classes()[name]("a sentence", scope="global", live=3, retry_after_s=1.5)
    again = pickle.loads(pickle.dumps(fault))
    assert type(again) is type(fault)
    assert (again.detail, again.fields, str(again)) == (fault.detail, fault.fields, "a sentence")
    assert again.live == 3


LEAN = [name for name in ("agent.loop", "agent.context", "actors.activation") if _is_module(name)]


@pytest.mark.parametrize("name", LEAN)
def test_what_a_session_actor_imports_stays_lean(name: str) -> None:
    """litellm costs 130 MB and seconds; a process per session cannot afford it."""
    script = f"import sys, {name}; print(sorted({{'litellm', 'fastapi', 'uvicorn', 'mcp'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, capture_output=True, text=True, timeout=15, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
