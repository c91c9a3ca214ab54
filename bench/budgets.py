"""What must hold, and whether it does: `bench/budgets.yaml` against the figures of one run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

BUDGETS = Path(__file__).with_name("budgets.yaml")

Verdict = Literal["met", "missed", "not measured"]


class Ratio(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    times: float
    of: str
    plus: float


class Budget(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    what: str
    figure: str
    at_most: float | Ratio | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("one of at_most and at_least")
        return self

    def judged(self, figures: Mapping[str, float]) -> "Judged":
        value = figures.get(self.figure)
        bound = self._bound(figures)
        if value is None or bound is None:
            return Judged(self, value, bound, "not measured")
        is_met = value >= bound if self.at_most is None else value <= bound
        return Judged(self, value, bound, "met" if is_met else "missed")

    def _bound(self, figures: Mapping[str, float]) -> float | None:
        if not isinstance(self.at_most, Ratio):
            return self.at_most if self.at_least is None else self.at_least
        reference = figures.get(self.at_most.of)
        return None if reference is None else self.at_most.times * reference + self.at_most.plus


class Judged(NamedTuple):
    budget: Budget
    value: float | None
    bound: float | None
    verdict: Verdict


def budgets(path: Path = BUDGETS) -> list[Budget]:
    return [Budget.model_validate(one) for one in yaml.safe_load(path.read_text())]
