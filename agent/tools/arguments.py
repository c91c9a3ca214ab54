"""What the arguments of every tool have in common."""

from pydantic import BaseModel, ConfigDict


class Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
