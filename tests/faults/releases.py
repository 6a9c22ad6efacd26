"""Copies of the services and shared packages as other releases have them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
FIELD: Final = "added_by_the_next_release"
# The position of a class's own fields: after its docstring and an optional configuration.
GROWN: Final = {
    "scanfleet/scanning/policy.py": r"class ScanPolicy\(BaseModel\):.*?model_config = [^\n]*\n",
    "scanfleet/contracts/messages/base.py": r"class Message\(BaseModel\):.*?model_config = [^\n]*\n",
    "job_orchestrator/domain/job.py": r'class ScanJob:\n    """.*?"""\n',
    "job_orchestrator/domain/totals.py": r'class Totals:\n    """.*?"""\n',
    "job_orchestrator/domain/chunk.py": r'class Chunk:\n    """.*?"""\n',
}


def copy_packages(root: Path, folder: Path) -> None:
    for package in (root / "shared/scanfleet", *root.glob("services/*/*_*/")):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))


def write_next_release(folder: Path) -> None:
    """Copy the services and shared packages of this checkout, and add an optional field to documents and messages."""
    copy_packages(ROOT, folder)
    for file, begins in GROWN.items():
        path = folder / file
        text, count = re.subn(
            begins,
            lambda match: f'{match[0]}\n    {FIELD}: str = "by default"\n',
            path.read_text(encoding="utf-8"),
            count=1,
            flags=re.DOTALL,
        )
        assert count == 1, file
        path.write_text(text, encoding="utf-8")
