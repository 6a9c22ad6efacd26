"""Fixtures of the worker's tests: chunks to scan and recorded output of nmap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scanfleet.contracts.messages import ScanChunk
from scanfleet.scanning.policy import Preset, fill_in

RECORDINGS = Path(__file__).parent / "recordings"


@pytest.fixture
def make_chunk() -> Callable[..., ScanChunk]:
    """Return a factory of chunks with the quick policy, updated with `policy`, and other fields replaced."""

    def make(policy: dict[str, Any] | None = None, **fields: Any) -> ScanChunk:
        asked = fill_in(Preset.QUICK, {"ports": "22,80"} | (policy or {}))
        return ScanChunk.model_validate(
            {
                "job_id": 1,
                "chunk_id": "1-0",
                "attempt": 1,
                "worker_id": "worker",
                "user_id": 7,
                "first_address": "127.9.1.0",
                "outcomes": "....",
                "policy": asked,
                "ports": asked.ports,
                "lease_seconds": 10.0,
                "estimate_seconds": 1.0,
            }
            | fields,
        )

    return make


@pytest.fixture
def recording() -> Callable[[str], bytes]:
    """Return a function that reads recorded output of real nmap; `recordings/record.sh` records it again."""
    return lambda name: (RECORDINGS / f"{name}.xml").read_bytes()
