"""Audit entries of what the orchestrator does by itself, without a request."""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

from scanfleet.clock import utc_now
from scanfleet.contracts.messages import AuditEntry
from scanfleet.contracts.messages.audit import MAX_REASON_CHARS
from scanfleet.services import ORCHESTRATOR


def own_entry(
    id_: str,
    action: str,
    target: str,
    decision: Literal["allowed", "refused"],
    rule: str,
    *,
    user_id: int | None = None,
    source: str = "",
    reason: str = "",
) -> AuditEntry:
    """Return an entry of the orchestrator itself; entries with an existing id are not stored again.

    Args:
        id_: unique among the entries of the orchestrator.
        action: the operation.
        target: the object of the operation.
        decision: whether the operation was allowed or refused.
        rule: the deciding rule.
        user_id: the owner of the object.
        source: the acting instance.
        reason: the reason of the decision.
    """
    return AuditEntry(
        id=id_,
        time=utc_now(),
        service=ORCHESTRATOR,
        subject="" if user_id is None else str(user_id),
        source=source[:200],
        action=action,
        target=target,
        decision=decision,
        rule=rule,
        reason=reason[:MAX_REASON_CHARS],
        request_id="",
    )


def first_use(purpose: str, key: str, *, source: str) -> AuditEntry:
    """Return the entry of a key's first use, which reveals an unauthorised key; its id is the same for the same key.

    Args:
        purpose: the objects that the key signs or verifies.
        key: name of the key; never the key itself.
        source: the first instance that uses it.
    """
    id_ = sha256(f"{purpose}\n{key}".encode()).hexdigest()[:32]
    return own_entry(id_, "use_key", f"{purpose}: key {key}", "allowed", "first use", source=source)
