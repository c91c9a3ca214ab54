"""`plan`: the list of what is to be done, kept where the person can see it."""

from typing import ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from agent.events import PlanItem, PlanUpdated
from agent.tools.arguments import Arguments
from agent.tools.contract import ToolResult, ToolScope


class Step(Arguments):
    id: str = Field(min_length=1, max_length=100, description="Unique in the list.")
    content: str = Field(min_length=1, max_length=2000, description="What is to be done.")
    status: Literal["pending", "in_progress", "completed"] = "pending"


class PlanArguments(Arguments):
    items: tuple[Step, ...] = Field(
        max_length=100, description="The whole list, in order; it replaces the one before."
    )

    @field_validator("items")
    @classmethod
    def ids_are_unique(cls, items: tuple[Step, ...]) -> tuple[Step, ...]:
        ids = [item.id for item in items]
        if repeated := sorted({one for one in ids if ids.count(one) > 1}):
            raise ValueError(f"ids must be unique; repeated: {', '.join(repeated)}")
        return items


class Plan:
    name: ClassVar[str] = "plan"
    description: ClassVar[str] = (
        "Replace the plan that the person sees: every step with its status. Use it for work of "
        "several steps, and update it when a step begins or is completed."
    )
    Arguments: ClassVar[type[BaseModel]] = PlanArguments
    idempotent: ClassVar[bool] = True

    async def run(self, arguments: PlanArguments, scope: ToolScope) -> ToolResult:
        del scope
        items = tuple(PlanItem(**item.model_dump()) for item in arguments.items)
        marks = {"pending": "[ ]", "in_progress": "[>]", "completed": "[x]"}
        lines = [f"{marks[item.status]} {item.id}: {item.content}" for item in items]
        return ToolResult(
            "\n".join(lines) or "The plan is empty.", facts=(PlanUpdated(items=items),)
        )
