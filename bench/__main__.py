"""Measure the platform against real alternatives in the same run: `python -m bench [PART …]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Final

from bench import capacity, control, platform, silent, xml_reader
from bench.figures import Figure, show

PARTS: Final[dict[str, Callable[[], Sequence[Figure]]]] = {
    "platform": platform.measure,
    "control": control.measure,
    "capacity": capacity.measure,
    "silent": silent.measure,
    "xml_reader": xml_reader.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; all without any")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]}: choose from {', '.join(PARTS)}")
    show(figure for part in parts for figure in PARTS[part]())


if __name__ == "__main__":
    main()
