"""The approval gate: one pure decision in front of every tool call."""

import json
import re
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from agent.jsontext import parsed
from agent.spec import Action, ApprovalPolicy, ApprovalRule, ArgumentPredicate


class Verdict(NamedTuple):
    action: Action
    reason: str = ""


def judge(policy: ApprovalPolicy, tool: str, arguments: str) -> Verdict:
    """The first rule that holds for this call decides; `arguments` is the JSON text."""
    try:
        value = parsed(arguments or "{}")
    except ValueError:
        value = _GARBAGE
    for rule in policy.rules:
        if _holds(rule, tool, value):
            return Verdict(rule.action, rule.reason)
    return Verdict(policy.default)


_GARBAGE = object()


def _holds(rule: ApprovalRule, tool: str, value: Any) -> bool:
    if not fnmatchcase(tool, rule.tools):
        return False
    if value is _GARBAGE:
        return rule.action != "allow" or not rule.when
    return all(_satisfied(predicate, value) for predicate in rule.when)


def _satisfied(predicate: ArgumentPredicate, value: Any) -> bool:
    for key in predicate.path.split("."):
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    if predicate.equals is not None and value != predicate.equals:
        return False
    if predicate.matches is not None:
        text = value if isinstance(value, str) else json.dumps(value)
        return re.search(predicate.matches, text) is not None
    return True
