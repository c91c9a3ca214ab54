"""Shipped doubles: deterministic stand-ins for what lives outside. Part of the product.

The demo and the tests of all floors use them; what has a contract here passes its contract suite.
"""

from agent.testing.model import NamedScripts, Reply, ScriptedModel, scripted_model

__all__ = ["NamedScripts", "Reply", "ScriptedModel", "scripted_model"]
