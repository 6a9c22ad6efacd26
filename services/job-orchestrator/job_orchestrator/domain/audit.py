"""Audit entries of keys: each is recorded when it is first used, so that one that nobody has rotated in is noticed."""

from __future__ import annotations

from hashlib import sha256

from scanfleet.clock import utc_now
from scanfleet.messages import AuditEntry
from scanfleet.messages.topics import ORCHESTRATOR


def first_use(purpose: str, key: str, *, source: str) -> AuditEntry:
    """Return the entry of a key's first use; the same key has the same id of an entry, so that it is recorded once.

    Args:
        purpose: what the key signs or verifies.
        key: names the key; never the key itself.
        source: where it was seen first.
    """
    return AuditEntry(
        id=sha256(f"{purpose}\n{key}".encode()).hexdigest()[:32],
        time=utc_now(),
        service=ORCHESTRATOR,
        subject="",
        source=source[:200],
        action="use_key",
        target=f"{purpose}: key {key}",
        decision="allowed",
        rule="first use",
        request_id="",
    )
