"""The tools that every agent may have."""

from agent.settings import ToolSettings
from agent.tools.contract import Tool
from agent.tools.files import Edit, Read, Write
from agent.tools.plan import Plan
from agent.tools.shell import Bash


def standard_tools(settings: ToolSettings) -> list[Tool]:
    return [Bash(settings), Read(settings), Write(), Edit(), Plan()]
