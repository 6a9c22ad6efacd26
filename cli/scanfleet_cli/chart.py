"""Draw a coverage map as letters: a cell for each address, or for the worst address of a block."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Final

from scanfleet.contracts import rest
from scanfleet.scanning.outcomes import Outcome
from scanfleet_cli.output import Output

NAMES: Final = {
    "a": "answered",
    "s": "silent",
    "d": "down",
    "t": "timed_out",
    "x": "excluded",
    "r": "refused",
    "c": "cancelled",
    "l": "lost",
    ">": "running",
    Outcome.BLANK.value: "waiting",
}
WORST_FIRST: Final = "lrct>.asdx"
"""An address, or a block of addresses, shows the first of these letters that occurs in it."""

SQUARE: Final = 16  # cells in a row, so that a row of a /24 is a /28
MOST_CELLS: Final = 1_024  # 64 rows: one or two screens


def lines(drawn: rest.CoverageMap, output: Output, width: int | None = None) -> Iterator[str]:
    """Yield the rows of a map, and its legend."""
    letters = _worst([block.letters for block in drawn.blocks])
    size = 1
    while len(letters) / size > MOST_CELLS:
        size *= SQUARE
    cells = "".join(_worst_of(letters[start : start + size]) for start in range(0, len(letters), size))
    first, columns = ip_address(drawn.first), width or SQUARE
    labels = [str(first + row * size) for row in range(0, len(cells), columns)]
    widest = max(map(len, labels), default=0)
    for label, row in zip(labels, range(0, len(cells), columns), strict=True):
        painted = "".join(output.paint(NAMES.get(cell, ""), cell) for cell in cells[row : row + columns])
        yield f"{label:<{widest}}  {painted}"
    yield " · ".join(
        output.paint(name, f"{letter} {name.replace('_', ' ')}") for letter, name in NAMES.items() if letter in cells
    )
    if size > 1:
        yield f"each cell is a /{first.max_prefixlen - (size.bit_length() - 1)}: the worst of its {size} addresses"


def _worst(blocks: list[str]) -> str:
    """Return the worst letter of each address over all port blocks."""
    if len(blocks) == 1:
        return blocks[0]
    return "".join(map(_worst_of, map("".join, zip(*blocks, strict=True))))


def _worst_of(letters: str) -> str:
    return next((each for each in WORST_FIRST if each in letters), letters[:1])
