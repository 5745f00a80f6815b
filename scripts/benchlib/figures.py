"""Numbers: series of measurements, goals, rows, and how they are shown. Measures nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class BenchError(Exception):
    """The run cannot go on; above all, an answer that is wrong."""


@dataclass(frozen=True)
class Series:
    """Measurements of one thing, in the row's unit."""

    name: str
    values: Sequence[float]

    def percentile(self, percent: float) -> float:
        """The nearest rank: always a value that was measured. With few values p99 is their maximum."""
        ordered = sorted(self.values)
        return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

    @property
    def p50(self) -> float:
        return self.percentile(50)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "n": len(self.values),
            **{f"p{percent}": round(self.percentile(percent), 3) for percent in (50, 95, 99)},
            "min": round(min(self.values), 3),
            "max": round(max(self.values), 3),
        }


@dataclass(frozen=True)
class Goal:
    text: str
    value: float
    met: bool


def at_most(what: str, value: float, limit: float, unit: str = "") -> Goal:
    return Goal(f"{what} at most {limit:g}{unit}", value, value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Goal:
    return Goal(f"{what} at least {limit:g}{unit}", value, value >= limit)


@dataclass
class Row:
    """One line of the table: our figures first, then those of each reference."""

    name: str
    title: str
    unit: str
    ours: Series
    references: list[Series] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ratio(self, reference: Series) -> float:
        return self.ours.p50 / reference.p50

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "ours": self.ours.as_json(),
            "references": [
                {**series.as_json(), "ratio_of_p50": round(self.ratio(series), 3)}
                for series in self.references
            ],
            "goals": [
                {"text": goal.text, "value": round(goal.value, 3), "met": goal.met} for goal in self.goals
            ],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        lines = [f"{self.name}: {self.title} ({self.unit})", _line(self.ours)]
        lines += [f"{_line(series)}   ours/this {self.ratio(series):.3g}" for series in self.references]
        for goal in self.goals:
            lines.append(f"  {'met    ' if goal.met else 'NOT MET'}  {goal.text}: {goal.value:.3g}")
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)


def alternate(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Each measure once a round, in turn and back again, so that the machine's noise hits all alike."""
    results: list[list[float]] = [[] for _ in measures]
    for number in range(rounds):
        order = range(len(measures))
        for index in order if number % 2 == 0 else reversed(order):
            results[index].append(measures[index]())
    return results


def _line(series: Series) -> str:
    figures = "  ".join(f"p{percent} {series.percentile(percent):9.2f}" for percent in (50, 95, 99))
    return f"  {series.name:<44} {figures}  n {len(series.values)}"
