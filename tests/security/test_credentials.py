"""A platform with authentication and authorization: TLS, certificates, passwords, ACLs and MongoDB users."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    TopicAuthorizationFailedError,
)
from pymongo import MongoClient
from pymongo.errors import OperationFailure, ServerSelectionTimeoutError

from local.stack import Stack
from scanfleet.contracts.messages.acls import acls_of
from scanfleet.contracts.messages.topics import SCAN_EVENTS, TOPICS
from scanfleet.kafka.broker import access
from scanfleet.services import GATEWAY, ORCHESTRATOR, RESULT_STORE, SERVICES, WITH_DATABASE, WORKER
from scanfleet_testing.waiting import until
from tests.client import Client

PREFIX: Final = "secured-"
LIMIT_SECONDS: Final = 60.0  # of every wait

# The expected rights by the architecture; the code derives them from its registry of topics.
MAY_WRITE: Final = {
    GATEWAY: {"scan-commands", "scan-audit-api-gateway"},
    ORCHESTRATOR: {
        *("scan-replies", "scan-tasks", "scan-events", "scan-results", "scan-audit-job-orchestrator"),
        *("scan-commands-dlq", "scan-workers-dlq", "scan-progress-dlq", "scan-stored-dlq", "scan-events-dlq"),
        *("scan-deletions", "scan-deletions-dlq", "scan-changes"),
        *(f"scan-audit-{writer}-dlq" for writer in (*SERVICES, "operator")),
    },
    WORKER: {"scan-workers", "scan-progress", "scan-results", "scan-audit-scanner-worker"},
    RESULT_STORE: {
        *("scan-stored", "scan-deletions", "scan-audit-result-store"),
        *("scan-results-dlq", "scan-deletions-dlq"),
    },
}
MAY_READ: Final = {
    GATEWAY: {"scan-replies", "scan-events"},
    ORCHESTRATOR: {
        *("scan-commands", "scan-workers", "scan-progress", "scan-stored", "scan-events", "scan-deletions"),
        *(f"scan-audit-{writer}" for writer in (*SERVICES, "operator")),
    },
    WORKER: {"scan-tasks"},
    RESULT_STORE: {"scan-results", "scan-deletions"},
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
    async with AIOKafkaProducer(**access(stack.servers.kafka_settings(service)), request_timeout_ms=10_000) as producer:
        yield producer


@pytest.mark.parametrize("service", SERVICES)
def test_acls_match_the_architecture(service: str) -> None:
    """Each service has exactly the topics of the architecture, and only services that share work have groups, named after them."""
    acls = acls_of(service)
    assert {acl.name for acl in acls if (acl.operation, acl.resource) == ("Write", "topic")} == MAY_WRITE[service]
    assert {acl.name for acl in acls if (acl.operation, acl.resource) == ("Read", "topic")} == MAY_READ[service]
    groups = {service} if service in {ORCHESTRATOR, RESULT_STORE} else set()
    assert {acl.name for acl in acls if (acl.operation, acl.resource) == ("Read", "group")} == groups
    assert len(set(acls)) == len(acls) == len(MAY_WRITE[service] | groups) + len(MAY_READ[service])


@pytest.mark.e2e
def test_scan_with_least_privilege_completes(stack: Stack) -> None:
    """The services' rights suffice to scan and to read the results."""
    user = Client(stack.url, stack.token(7))
    with user.http, socket.create_server(("127.9.6.1", 0)) as server:
        port = server.getsockname()[1]
        job_id = user.scan("127.9.6.1/32", ports=str(port), service_detection=False)
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert user.ledger(job_id)["accounted"]
        assert [each["port"] for each in user.results(job_id)] == [port]


@pytest.mark.e2e
@pytest.mark.parametrize("service", ["job-orchestrator", "result-store"])
def test_client_without_a_certificate_gets_no_answer(stack: Stack, service: str) -> None:
    """A service behind the gateway answers probes without a certificate, and other requests only with the gateway's certificate."""
    authority = ssl.create_default_context(cafile=str(stack.folder / "certificates" / service / "ca.crt"))
    with httpx2.Client(verify=authority) as client:
        assert client.get(f"{stack.ports.probes(service)}/readyz").status_code == 200
        for scheme in ("http", "https"):
            with pytest.raises(httpx2.TransportError):
                client.get(f"{scheme}://{stack.ports.address(service)}/internal/ready")


@pytest.mark.e2e
async def test_unreadable_records_are_dead_lettered(stack: Stack) -> None:
    """Every consumer group dead-letters unreadable records of its topics, and has the right to do so."""
    read = [topic for topic in TOPICS if set(topic.consumers) & {*WITH_DATABASE} and topic is not SCAN_EVENTS]
    async with producer_of(stack) as producer:
        for topic in read:
            await producer.send_and_wait(PREFIX + topic.name, b"nonsense", key=b"k")
    letters = [PREFIX + topic.dead_letter for topic in read for _ in set(topic.consumers) & {*WITH_DATABASE}]
    reader = AIOKafkaConsumer(*set(letters), **access(stack.servers.kafka_settings()), auto_offset_reset="earliest")
    async with reader, asyncio.timeout(LIMIT_SECONDS):
        while letters:
            record = await reader.getone()
            if record.value == b"nonsense":
                letters.remove(record.topic)


@pytest.mark.e2e
@pytest.mark.parametrize("service", SERVICES)
async def test_services_cannot_write_other_topics(stack: Stack, service: str) -> None:
    """The broker rejects a record of a service to any other topic."""
    async with producer_of(stack, service) as producer:
        for name in sorted(EVERYTHING - MAY_WRITE[service]):
            with pytest.raises(TopicAuthorizationFailedError):
                await producer.send_and_wait(PREFIX + name, b"{}", key=b"k")


@pytest.mark.e2e
@pytest.mark.parametrize("service", SERVICES)
async def test_services_cannot_read_other_topics(stack: Stack, service: str) -> None:
    """The broker returns no record of any other topic to a service."""
    async with producer_of(stack) as producer:
        for name in sorted(EVERYTHING - MAY_READ[service]):
            await producer.send_and_wait(PREFIX + name, b"nonsense", key=b"k", partition=0)
    async with producer_of(stack, service) as client:
        for name in sorted(EVERYTHING - MAY_READ[service] - MAY_WRITE[service]):
            with pytest.raises(TopicAuthorizationFailedError):  # the error does not reveal whether the topic exists
                await client.partitions_for(PREFIX + name)
    async with AIOKafkaConsumer(**access(stack.servers.kafka_settings(service))) as consumer:
        for name in sorted(MAY_WRITE[service] - MAY_READ[service]):
            partition = TopicPartition(PREFIX + name, 0)
            consumer.assign([partition])
            consumer.seek(partition, 0)
            with pytest.raises(TopicAuthorizationFailedError):
                await asyncio.wait_for(consumer.getone(), LIMIT_SECONDS)


@pytest.mark.e2e
async def test_workers_cannot_join_groups(stack: Stack) -> None:
    """A worker can neither join the orchestrator's group on its own topic nor move the offsets of its readers."""
    group = f"{PREFIX}{ORCHESTRATOR}-scan-progress"
    partition = TopicPartition(f"{PREFIX}scan-tasks", 0)
    async with AIOKafkaConsumer(**access(stack.servers.kafka_settings(WORKER)), group_id=group) as consumer:
        consumer.assign([partition])
        with pytest.raises(GroupAuthorizationFailedError):
            await asyncio.wait_for(consumer.commit({partition: 0}), LIMIT_SECONDS)


@pytest.mark.e2e
@pytest.mark.parametrize("change", ["password", "user", "anonymous", "plaintext", "authority"])
async def test_connections_without_credentials_are_rejected(stack: Stack, change: str) -> None:
    """A wrong password, an unknown or missing name, a plaintext connection, or an unknown authority is rejected."""
    ours = access(stack.servers.kafka_settings(WORKER))
    other: dict[str, dict[str, Any]] = {
        "password": {"sasl_plain_password": "guess"},
        "user": {"sasl_plain_username": "unknown"},
        "anonymous": {"security_protocol": "SSL"},
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
def test_databases_are_separate(stack: Stack) -> None:
    """Each of the two services with a database reads only its own database, and lists no users."""
    names = {service: stack.servers.database(service) for service in (ORCHESTRATOR, RESULT_STORE)}
    for service, mine in names.items():
        with mongo(stack.servers.mongodb_of(service)) as client:
            client[mine].list_collection_names()
            for other in {*names.values(), "admin", "local"} - {mine}:
                with pytest.raises(OperationFailure, match="not authorized"):
                    client[other].list_collection_names()
            with pytest.raises(OperationFailure, match="not authorized"):
                client[mine].command("usersInfo")


@pytest.mark.e2e
def test_workers_cannot_read_mongodb(stack: Stack) -> None:
    """Neither a worker's Kafka credentials, nor an anonymous or plaintext connection, give access to MongoDB."""
    password = stack.servers.kafka_settings(WORKER).kafka_password
    address, _, options = stack.servers.mongodb.rpartition("@")[2].partition("/?")
    tls = options.replace("&authSource=admin", "")
    for database in ("admin", stack.servers.database(ORCHESTRATOR), stack.servers.database(RESULT_STORE)):
        worker = f"mongodb://{PREFIX}{WORKER}:{password}@{address}/?{tls}&authSource={database}"
        with mongo(worker) as client, pytest.raises(OperationFailure, match="Authentication failed"):
            client[database].list_collection_names()
        with mongo(f"mongodb://{address}/?{tls}") as client, pytest.raises(OperationFailure, match="requires auth"):
            client[database].list_collection_names()
    with mongo(f"mongodb://{address}/?directConnection=true") as client, pytest.raises(ServerSelectionTimeoutError):
        client["admin"].command("ping")


@pytest.mark.e2e
def test_passwords_are_not_exposed(stack: Stack) -> None:
    """No password is in a service's environment or in its log."""
    secrets = [stack.servers.mongodb_of(service) for service in (ORCHESTRATOR, RESULT_STORE)]
    secrets += [str(stack.servers.kafka_settings(service).kafka_password) for service in SERVICES]
    for service in SERVICES:
        visible = Path(f"/proc/{stack.pid(service)}/environ").read_text(encoding="utf-8")
        visible += (stack.folder / "logs" / f"{service}.log").read_text(encoding="utf-8")
        assert not [secret for secret in secrets if secret in visible]
