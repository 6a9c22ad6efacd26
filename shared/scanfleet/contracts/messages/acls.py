"""The Kafka ACLs of each service, derived from the topic registry; nothing else is allowed.

In Kafka, read and write access include describe, and write access to a topic allows an idempotent producer (since 3.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from scanfleet.contracts.messages.topics import MIB, TOPICS
from scanfleet.services import WITH_DATABASE

QUOTAS: Final = {"producer_byte_rate": 16 * MIB, "consumer_byte_rate": 64 * MIB}
"""Quota in bytes per second of each service (all processes together) at each broker; the broker throttles the excess.

Ten times the need of a busy platform with 20 workers, and too little for a compromised service to slow the others.
"""


@dataclass(frozen=True, slots=True)
class Acl:
    """One permission of one service; names are without prefix."""

    service: str
    operation: Literal["Read", "Write"]
    resource: Literal["topic", "group"]
    name: str
    """Name of a topic, or name prefix of groups."""


def acls_of(service: str) -> tuple[Acl, ...]:
    """Return a service's ACLs: to write and read its topics, and for groups their offsets and dead letters.

    Services with a database read as members of groups, whose names start with the service's name; the others without one.
    """
    read = [topic for topic in TOPICS if service in topic.consumers]
    return (
        *(Acl(service, "Write", "topic", topic.name) for topic in TOPICS if service in topic.producers),
        *(Acl(service, "Write", "topic", topic.dead_letter) for topic in read if service in WITH_DATABASE),
        *(Acl(service, "Read", "topic", topic.name) for topic in read),
        *([Acl(service, "Read", "group", service)] if service in WITH_DATABASE else ()),
    )
