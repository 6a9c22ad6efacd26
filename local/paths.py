"""Where things are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".local"
"""The stack of `make up`: its data, logs, ports and keys."""
TOOLS = STATE / "tools"
"""What `make` installed for every stack of this clone: Kafka's jars and, where PATH has none, mongod."""
