"""Draw a coverage map as letters: a cell for each address, or for the worst address of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from typing import Final

from scanfleet.contracts import rest
from scanfleet.scanning.outcomes import Outcome
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
WORST_FIRST: Final = "lrct>.asdx"
"""An address, or a block of addresses, shows the first of these letters that occurs in it."""

SQUARE: Final = 16  # cells in a row, so that a row of a /24 is a /28
SINGLE: Final = 1_024  # addresses that have a cell each; more are drawn as blocks
BLOCK: Final = 16  # addresses of a block; its square is the block of a narrow terminal
MOST_COLUMNS: Final = 64
GAP: Final = 2  # spaces after a label
MORE_DIGITS: Final = 4  # of a label than the first has: 10.0.0.0 and 10.0.252.0
LARGEST_BITS: Final = 16  # of the size of a block: a response has up to 65,536 addresses


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
    size = _size(len(letters), block, first.max_prefixlen)
    columns = width or _columns(len(letters), size)
    widest = len(str(first)) + MORE_DIGITS + GAP + columns
    if block is None and width is None and output.terminal and size == BLOCK and widest > output.width:
        size = BLOCK**2
        columns = _columns(len(letters), size)
        output.note(f"too wide for this terminal: showing /{_prefix(first, size)}s")
    # Cells are whole prefixes, of which the first and the last may have fewer addresses in the map.
    skew = int(first) % size
    edges = [0, *range(size - skew, len(letters), size), len(letters)]
    cells = "".join(_worst_of(letters[start:end]) for start, end in pairwise(edges))
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


def _size(addresses: int, block: int | None, longest: int) -> int:
    """Return the number of addresses of a cell."""
    if block is None:
        return 1 if addresses <= SINGLE else BLOCK
    if not longest - LARGEST_BITS <= block <= longest:
        raise CommandError(f"--block: {block} is not between {longest - LARGEST_BITS} and {longest}")
    return 1 << (longest - block)


def _columns(addresses: int, size: int) -> int:
    """Return the cells per row of a map that is about square."""
    columns = SQUARE
    while columns**2 * size < addresses and columns < MOST_COLUMNS:
        columns *= 2
    return columns


def _prefix(first: IPv4Address | IPv6Address, size: int) -> int:
    return first.max_prefixlen - (size.bit_length() - 1)


def _worst(blocks: list[str]) -> str:
    """Return the worst letter of each address over all port blocks."""
    if len(blocks) == 1:
        return blocks[0]
    return "".join(map(_worst_of, map("".join, zip(*blocks, strict=True))))


def _worst_of(letters: str) -> str:
    return next((each for each in WORST_FIRST if each in letters), letters[:1])
