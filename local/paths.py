"""Paths of the local stack."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".local"
"""The stack of `make up`: its data, logs, ports and keys."""
TOOLS = STATE / "tools"
"""Tools installed by `make` for all stacks of this clone: Kafka's jars and, if PATH has none, mongod."""
SCANFLEET = str(Path(sys.executable).with_name("scanfleet"))
"""The command of this environment."""
