"""A platform whose servers ask who is there: TLS, passwords, ACLs and MongoDB's users, all on at once."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    TopicAuthorizationFailedError,
)
from pymongo import MongoClient
from pymongo.errors import OperationFailure, ServerSelectionTimeoutError

from local.client import Client
from local.stack import Stack
from scanfleet.kafka.broker import access
from scanfleet.messages.acls import MEMBERS, SERVICES, acls_of
from scanfleet.messages.topics import GATEWAY, ORCHESTRATOR, RESULT_STORE, SCAN_EVENTS, TOPICS, WORKER
from scanfleet.testing.consumers import until

PREFIX: Final = "secured-"
LIMIT: Final = 60.0  # seconds until any of this has happened

# As the architecture has it; the code derives the same from its registry of topics.
MAY_WRITE: Final = {
    GATEWAY: {"scan-commands", "scan-audit-api-gateway"},
    ORCHESTRATOR: {
        *("scan-replies", "scan-tasks", "scan-events", "scan-results", "scan-audit-job-orchestrator"),
        *("scan-commands-dlq", "scan-workers-dlq", "scan-progress-dlq", "scan-stored-dlq", "scan-events-dlq"),
        *(f"scan-audit-{service}-dlq" for service in SERVICES),
    },
    WORKER: {"scan-workers", "scan-progress", "scan-results", "scan-audit-scanner-worker"},
    RESULT_STORE: {"scan-stored", "scan-audit-result-store", "scan-results-dlq"},
}
MAY_READ: Final = {
    GATEWAY: {"scan-replies", "scan-events"},
    ORCHESTRATOR: {
        *("scan-commands", "scan-workers", "scan-progress", "scan-stored", "scan-events"),
        *(f"scan-audit-{service}" for service in SERVICES),
    },
    WORKER: {"scan-tasks"},
    RESULT_STORE: {"scan-results"},
}
EVERYTHING: Final = {topic.name for topic in TOPICS} | {topic.dead_letter for topic in TOPICS}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(
        tmp_path_factory.mktemp("secured"),
        replicas=dict.fromkeys(SERVICES, 1),
        topic_prefix=PREFIX,
        database_prefix="secured",
        secured=True,
    )
    stack.up()
    yield stack
    stack.down()


@asynccontextmanager
async def producer_of(stack: Stack, service: str | None = None) -> AsyncIterator[AIOKafkaProducer]:
    async with AIOKafkaProducer(**access(stack.kafka_settings(service)), request_timeout_ms=10_000) as producer:
        yield producer


@pytest.mark.parametrize("service", SERVICES)
def test_rights_are_those_of_the_architecture(service: str) -> None:
    """A service writes and reads what the architecture says, and only those that share work have groups, named after them."""
    acls = acls_of(service)
    assert {acl.name for acl in acls if (acl.operation, acl.resource) == ("Write", "topic")} == MAY_WRITE[service]
    assert {acl.name for acl in acls if (acl.operation, acl.resource) == ("Read", "topic")} == MAY_READ[service]
    groups = {service} if service in {ORCHESTRATOR, RESULT_STORE} else set()
    assert {acl.name for acl in acls if (acl.operation, acl.resource) == ("Read", "group")} == groups
    assert len(set(acls)) == len(acls) == len(MAY_WRITE[service] | groups) + len(MAY_READ[service])


@pytest.mark.e2e
def test_a_scan_completes(stack: Stack) -> None:
    """The rights that services have are enough to scan and to read what was found."""
    user = Client(stack.url, stack.token(7))
    with user.http, socket.create_server(("127.9.6.1", 0)) as server:
        port = server.getsockname()[1]
        job_id = user.scan("127.9.6.1/32", ports=str(port), service_detection=False)
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert user.ledger(job_id)["accounted"]
        assert [each["port"] for each in user.results(job_id)] == [port]


@pytest.mark.e2e
async def test_what_cannot_be_read_is_put_aside(stack: Stack) -> None:
    """Every member of a group may write to the dead-letter topics of what it reads, and does."""
    read = [topic for topic in TOPICS if set(topic.consumers) & {*MEMBERS} and topic is not SCAN_EVENTS]
    async with producer_of(stack) as producer:
        for topic in read:
            await producer.send_and_wait(PREFIX + topic.name, b"nonsense", key=b"k")
    letters = [PREFIX + topic.dead_letter for topic in read]
    reader = AIOKafkaConsumer(*letters, **access(stack.kafka_settings()), auto_offset_reset="earliest")
    async with reader, asyncio.timeout(LIMIT):
        while letters:
            record = await reader.getone()
            if record.value == b"nonsense":
                letters.remove(record.topic)


@pytest.mark.e2e
@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_writes_nothing_else(stack: Stack, service: str) -> None:
    """The broker refuses a record of any topic that is not for this service to write."""
    async with producer_of(stack, service) as producer:
        for name in sorted(EVERYTHING - MAY_WRITE[service]):
            with pytest.raises(TopicAuthorizationFailedError):
                await producer.send_and_wait(PREFIX + name, b"{}", key=b"k")


@pytest.mark.e2e
@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_reads_nothing_else(stack: Stack, service: str) -> None:
    """The broker gives no record of any topic that is not for this service to read."""
    async with producer_of(stack) as producer:
        for name in sorted(EVERYTHING - MAY_READ[service]):
            await producer.send_and_wait(PREFIX + name, b"nonsense", key=b"k", partition=0)
    async with producer_of(stack, service) as client:
        for name in sorted(EVERYTHING - MAY_READ[service] - MAY_WRITE[service]):
            with pytest.raises(TopicAuthorizationFailedError):  # not even that it is there
                await client.partitions_for(PREFIX + name)
    async with AIOKafkaConsumer(**access(stack.kafka_settings(service))) as consumer:
        for name in sorted(MAY_WRITE[service] - MAY_READ[service]):
            partition = TopicPartition(PREFIX + name, 0)
            consumer.assign([partition])
            consumer.seek(partition, 0)
            with pytest.raises(TopicAuthorizationFailedError):
                await asyncio.wait_for(consumer.getone(), LIMIT)


@pytest.mark.e2e
async def test_a_worker_joins_no_group(stack: Stack) -> None:
    """A worker cannot take the orchestrator's share of its own topic, nor move the offsets of those who read it."""
    group = f"{PREFIX}{ORCHESTRATOR}-scan-progress"
    partition = TopicPartition(f"{PREFIX}scan-tasks", 0)
    async with AIOKafkaConsumer(**access(stack.kafka_settings(WORKER)), group_id=group) as consumer:
        consumer.assign([partition])
        with pytest.raises(GroupAuthorizationFailedError):
            await asyncio.wait_for(consumer.commit({partition: 0}), LIMIT)


@pytest.mark.e2e
@pytest.mark.parametrize("change", ["password", "user", "nobody", "plaintext", "authority"])
async def test_who_has_no_credentials_is_let_nothing(stack: Stack, change: str) -> None:
    """A wrong password, an unknown name, none at all, a connection in the clear and a broker of an unknown authority: no connection."""
    ours = access(stack.kafka_settings(WORKER))
    other: dict[str, dict[str, Any]] = {
        "password": {"sasl_plain_password": "guess"},
        "user": {"sasl_plain_username": "nobody"},
        "nobody": {"security_protocol": "SSL"},
        "plaintext": {"security_protocol": "SASL_PLAINTEXT"},
        "authority": {"ssl_context": ssl.create_default_context()},
    }
    before = sockets()
    client = AIOKafkaProducer(**ours | other[change], request_timeout_ms=2_000)
    try:
        with pytest.raises(KafkaConnectionError):
            await client.start()
    finally:
        await client.stop()
    await until(lambda: not sockets() - before)  # aiokafka does not wait for its TLS connections to close


def sockets() -> set[str]:
    """List the sockets that this process has open."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            links.append(str(descriptor.readlink()))
    return {link for link in links if link.startswith("socket:")}


def mongo(uri: str) -> MongoClient[dict[str, Any]]:
    return MongoClient(uri, serverSelectionTimeoutMS=5_000)


@pytest.mark.e2e
def test_only_who_owns_a_database_reads_it(stack: Stack) -> None:
    """Each of the two services with a database reads its own and not the other's, and lists nobody's users."""
    names = {service: stack.database(service) for service in (ORCHESTRATOR, RESULT_STORE)}
    for service, mine in names.items():
        with mongo(stack.mongodb_of(service)) as client:
            client[mine].list_collection_names()
            for other in {*names.values(), "admin", "local"} - {mine}:
                with pytest.raises(OperationFailure, match="not authorized"):
                    client[other].list_collection_names()
            with pytest.raises(OperationFailure, match="not authorized"):
                client[mine].command("usersInfo")


@pytest.mark.e2e
def test_a_worker_cannot_read_mongodb(stack: Stack) -> None:
    """What a worker has opens no database: not its name and password on the bus, nor being nobody, nor a connection in the clear."""
    password = stack.kafka_settings(WORKER).kafka_password
    address, _, options = stack.mongodb.rpartition("@")[2].partition("/?")
    tls = options.replace("&authSource=admin", "")
    for database in ("admin", stack.database(ORCHESTRATOR), stack.database(RESULT_STORE)):
        worker = f"mongodb://{PREFIX}{WORKER}:{password}@{address}/?{tls}&authSource={database}"
        with mongo(worker) as client, pytest.raises(OperationFailure, match="Authentication failed"):
            client[database].list_collection_names()
        with mongo(f"mongodb://{address}/?{tls}") as client, pytest.raises(OperationFailure, match="requires auth"):
            client[database].list_collection_names()
    with mongo(f"mongodb://{address}/?directConnection=true") as client, pytest.raises(ServerSelectionTimeoutError):
        client["admin"].command("ping")


@pytest.mark.e2e
def test_no_password_is_said(stack: Stack) -> None:
    """No password is in a service's environment or in its log."""
    secrets = [stack.mongodb_of(service) for service in (ORCHESTRATOR, RESULT_STORE)]
    secrets += [str(stack.kafka_settings(service).kafka_password) for service in SERVICES]
    for service in SERVICES:
        said = Path(f"/proc/{stack.pid(service)}/environ").read_text(encoding="utf-8")
        said += (stack.folder / "logs" / f"{service}.log").read_text(encoding="utf-8")
        assert not [secret for secret in secrets if secret in said]
