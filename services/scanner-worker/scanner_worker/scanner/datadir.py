"""Write nmap's data folder: the list of scripts, and a script engine that confines them to the scanned addresses.

nmap searches this folder first and loads all other files from its installation: scripts, libraries, probes, fingerprints.
"""

from __future__ import annotations

import shutil
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final

from scanfleet.scanning.policy import VERSION_SCRIPTS

_ENGINE: Final = Path(__file__).with_name("confined.lua")


def write(folder: Path, scripts: AbstractSet[str]) -> None:
    """Create `folder` and its files.

    Raises:
        OSError: the folder cannot be written.
    """
    (folder / "scripts").mkdir(parents=True)
    shutil.copyfile(_ENGINE, folder / "nse_main.lua")
    (folder / "scripts" / "script.db").write_text("".join(map(_entry, sorted(scripts))), encoding="utf-8")


def _entry(name: str) -> str:
    # Service detection runs every script of the category "version", and nothing else selects by category.
    categories = '"version"' if name in VERSION_SCRIPTS else ""
    return f'Entry {{ filename = "{name}.nse", categories = {{ {categories} }} }}\n'
