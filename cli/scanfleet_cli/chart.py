"""Draw a coverage map as letters: a cell for each letter, or for the worst one of a block of addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from typing import Final

from scanfleet.contracts import rest
from scanfleet.scanning.outcomes import Outcome, worst
from scanfleet_cli.errors import CommandError
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
SQUARE: Final = 16  # cells in a row, so that a row of a /24 is a /28
SINGLE: Final = 1_024  # addresses that have a cell each; more are drawn as blocks
BLOCK: Final = 16  # addresses of a block; its square is the block of a narrow terminal
MOST_COLUMNS: Final = 64
GAP: Final = 2  # spaces after a label
MORE_DIGITS: Final = 4  # of a label than the first has: 10.0.0.0 and 10.0.252.0
LARGEST_BITS: Final = 16  # of the letters of a block: a response has up to 65,536


def lines(
    drawn: rest.CoverageMap,
    output: Output,
    *,
    block: int | None = None,
    width: int | None = None,
    plain: bool = False,
) -> Iterator[str]:
    """Yield the rows of a map, and its legend.

    Args:
        drawn: the map.
        output: of the command.
        block: prefix length of a cell; by default the map decides.
        width: cells per row; by default the map decides.
        plain: whether to use only ASCII characters and no colours.

    Raises:
        CommandError: the prefix length does not suit the addresses.
    """
    first, letters = ip_address(drawn.first), _worst([each.letters for each in drawn.blocks])
    size = _size(drawn, block, first.max_prefixlen)
    columns = width or _columns(-(-drawn.addresses // size))
    widest = len(str(first)) + MORE_DIGITS + GAP + columns
    if block is None and width is None and output.terminal and size == BLOCK and widest > output.width:
        size = BLOCK**2
        columns = _columns(drawn.addresses // size)
        output.note(f"too wide for this terminal: showing /{_prefix(first, size)}s")
    # Cells are whole prefixes, of which the first and the last may have fewer addresses in the map.
    skew = int(first) % size
    edges = [0, *range((size - skew) // drawn.step, len(letters), size // drawn.step), len(letters)]
    cells = "".join(worst(letters[start:end]) for start, end in pairwise(edges))
    paint: Callable[[str, str], str] = (lambda _name, text: text) if plain else output.paint
    labels = [str(first - skew + row * size) for row in range(0, len(cells), columns)]
    indent = max(map(len, labels), default=0) + GAP
    for row, label in enumerate(labels):
        painted = "".join(paint(NAMES.get(cell, ""), cell) for cell in cells[row * columns : (row + 1) * columns])
        yield f"{label:<{indent}}{painted}"
    yield (", " if plain else " · ").join(
        paint(name, f"{letter} {name.replace('_', ' ')}") for letter, name in NAMES.items() if letter in cells
    )
    if size > 1:
        yield f"each cell is a /{_prefix(first, size)}: the worst of its addresses"


def _size(drawn: rest.CoverageMap, block: int | None, longest: int) -> int:
    """Return the number of addresses of a cell."""
    if block is None:
        return drawn.step if drawn.step > 1 or drawn.addresses <= SINGLE else BLOCK
    most = longest - (drawn.step.bit_length() - 1)
    if not most - LARGEST_BITS <= block <= most:
        raise CommandError(f"--block: {block} is not between {most - LARGEST_BITS} and {most}")
    return 1 << (longest - block)


def _columns(cells: int) -> int:
    """Return the cells per row of a map that is about square."""
    columns = SQUARE
    while columns**2 < cells and columns < MOST_COLUMNS:
        columns *= 2
    return columns


def _prefix(first: IPv4Address | IPv6Address, size: int) -> int:
    return first.max_prefixlen - (size.bit_length() - 1)


def _worst(blocks: list[str]) -> str:
    """Return the worst letter of each address over all port blocks."""
    if len(blocks) == 1:
        return blocks[0]
    return "".join(map(worst, map("".join, zip(*blocks, strict=True))))
