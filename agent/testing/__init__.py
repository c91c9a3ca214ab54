"""Shipped doubles: deterministic stand-ins for what lives outside. Part of the product.

The demo and the tests of all floors use them; what has a contract here passes its contract suite.
"""

from agent.testing.model import NamedScripts, Reply, ScriptedModel, scripted_model
from agent.testing.sandbox import FakeSandbox

__all__ = ["FakeSandbox", "NamedScripts", "Reply", "ScriptedModel", "scripted_model"]
