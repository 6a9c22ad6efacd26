"""What each service may do on the bus: it follows from the topic registry, and nothing else is allowed.

To read or to write includes to describe, in Kafka, and who may write to a topic may be an idempotent producer (since 3.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from scanfleet.messages.topics import GATEWAY, MIB, ORCHESTRATOR, RESULT_STORE, TOPICS, WORKER

SERVICES: Final = (GATEWAY, ORCHESTRATOR, WORKER, RESULT_STORE)
MEMBERS: Final = (ORCHESTRATOR, RESULT_STORE)
"""Who reads as a member of groups; the others read without one. The names of a service's groups begin with its own."""

QUOTAS: Final = {"producer_byte_rate": 16 * MIB, "consumer_byte_rate": 64 * MIB}
"""Bytes a second of each service at each broker, all its processes together: the broker delays what goes beyond.

Ten times what a busy platform of 20 workers needs, and too little to slow the others of one that is taken over.
"""


@dataclass(frozen=True, slots=True)
class Acl:
    """One thing that one service may do; names are without their prefix."""

    service: str
    operation: Literal["Read", "Write"]
    resource: Literal["topic", "group"]
    name: str
    """Of a topic; of a group the beginning."""


def acls_of(service: str) -> tuple[Acl, ...]:
    """A service's rights: to write and to read its topics, and as a member of groups to these and to dead letters."""
    read = [topic for topic in TOPICS if service in topic.consumers]
    return (
        *(Acl(service, "Write", "topic", topic.name) for topic in TOPICS if service in topic.producers),
        *(Acl(service, "Write", "topic", topic.dead_letter) for topic in read if service in MEMBERS),
        *(Acl(service, "Read", "topic", topic.name) for topic in read),
        *([Acl(service, "Read", "group", service)] if service in MEMBERS else ()),
    )
