"""A measured figure, and how figures are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value.

    Attributes:
        name: key in the line of JSON; ends with the unit unless it is a ratio.
        value: the measurement.
        meaning: one phrase for the table.
        at_most: goal that a lower value meets, or None.
        at_least: goal that a higher value meets, or None.
    """

    name: str
    value: float
    meaning: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def goal(self) -> str:
        """The goal and whether it is met; empty without a goal."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g} {'met' if self.value <= self.at_most else 'missed'}"
        if self.at_least is not None:
            return f"≥ {self.at_least:g} {'met' if self.value >= self.at_least else 'missed'}"
        return ""


def show(figures: Iterable[Figure]) -> None:
    """Print a table for people, and one line of JSON for programs."""
    figures = list(figures)
    width = max((len(figure.name) for figure in figures), default=0)
    for figure in figures:
        print(f"{figure.name:{width}}  {figure.value:>10.4g}  {figure.goal:14}  {figure.meaning}")
    print(json.dumps({figure.name: float(f"{figure.value:.4g}") for figure in figures}))
