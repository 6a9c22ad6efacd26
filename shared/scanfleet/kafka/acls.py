"""Creation of the ACLs of the services' users."""

from __future__ import annotations

from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import NoError, for_code
from aiokafka.protocol.admin import CreateAclsRequest

from scanfleet.contracts.messages.acls import Acl, acls_of
from scanfleet.kafka.broker import administering
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.services import SERVICES

# Kafka's numeric codes.
_RESOURCES: Final = {"topic": 2, "group": 3}
_PATTERNS: Final = {"topic": 3, "group": 4}  # literal, prefixed
_OPERATIONS: Final = {"Read": 3, "Write": 4}
_ALLOW: Final = 3


async def create_acls(settings: KafkaSettings) -> None:
    """Create the ACLs of each service's user, which is named after the service. Idempotent; removes no ACL.

    Args:
        settings: broker, prefix (of topics, groups and users) and credentials of a user who may alter the cluster.

    Raises:
        DependencyError: no broker answered in time.
        RuntimeError: the broker refused; the message has the reason.
        OSError: a file that the settings name cannot be read.
    """
    async with administering(settings, f"cannot create ACLs at {settings.kafka}") as admin:
        for service in SERVICES:
            for acl in acls_of(service):
                await _create(admin, acl, settings.topic_prefix)


async def _create(admin: AIOKafkaAdminClient, acl: Acl, prefix: str) -> None:
    request = CreateAclsRequest(
        _RESOURCES[acl.resource],
        prefix + acl.name,
        _PATTERNS[acl.resource],
        f"User:{prefix}{acl.service}",
        "*",  # from every host
        _OPERATIONS[acl.operation],
        _ALLOW,
    )
    response = await admin._send_request(request)  # noqa: SLF001 # the client has this request but no method for it
    for code, message in response.creation_responses:
        if (error := for_code(code)) is not NoError:
            raise RuntimeError(f"the broker rejected {acl}: {error.__name__} {message}")
