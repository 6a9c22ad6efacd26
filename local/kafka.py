"""One-node Kafka in KRaft mode: its command and its readiness check.

This module does not run the broker: the stack passes `command` to its supervisor, the tests to a subprocess.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from base64 import urlsafe_b64encode
from collections.abc import Collection, Mapping
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from local.credentials import ADMIN, Credentials
from local.paths import TOOLS
from local.wait import listens
from scanfleet.kafka.broker import access
from scanfleet.runtime.settings import KafkaSettings

UP_SECONDS = 120.0  # timeout of an answer: recovering a large log after a kill takes long

PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=BROKER://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
inter.broker.listener.name=BROKER
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
listener.security.protocol.map=CONTROLLER:{protocol},BROKER:{protocol}
log.dirs={data}
# Using an undeclared topic is a bug.
auto.create.topics.enable=false
# One node holds everything.
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# The first consumer of a group does not wait for others.
group.initial.rebalance.delay.ms=0
# A broker that restarts after a kill waits until its controller has expired the previous one (9 s by default).
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# One broker serves a few groups; fifty partitions would only slow its start.
offsets.topic.num.partitions=8
"""

# TLS, passwords, and no access without an ACL. Broker and controller authenticate to each other as the administrator,
# by a mechanism that needs no users in the controller's own log.
SECURED = """\
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:{admin}
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
sasl.mechanism.controller.protocol=PLAIN
listener.name.broker.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.broker.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required \
    username="{admin}" password="{password}";
listener.name.controller.sasl.enabled.mechanisms=PLAIN
listener.name.controller.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
    username="{admin}" password="{password}" user_{admin}="{password}";
ssl.keystore.type=PEM
ssl.keystore.location={server}
ssl.truststore.type=PEM
ssl.truststore.location={authority}
"""

JAVA = (
    "java",
    "-Xmx512m",
    "-XX:+UseSerialGC",  # the collector with the fewest threads
    "-XX:TieredStopAtLevel=1",  # full optimisation would lengthen the start by a third
    "-Dlog4j2.level=WARN",
    "-cp",
)


def command(
    folder: Path,
    port: int,
    controller_port: int,
    credentials: Credentials | None = None,
    users: Collection[str] = (),
) -> list[str]:
    """Return the command that runs the broker in the foreground with its data under `folder`, formatted on first use.

    With `credentials` it authenticates `users` and the administrator by password and enforces ACLs.

    Raises:
        RuntimeError: the folder could not be formatted; the message has Kafka's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    properties = folder / "server.properties"
    text = PROPERTIES.format(
        port=port,
        controller_port=controller_port,
        protocol="SASL_SSL" if credentials else "PLAINTEXT",
        data=folder / "data",
    )
    if credentials is not None:
        text += SECURED.format(
            admin=ADMIN,
            password=credentials.password(ADMIN),
            server=credentials.server,
            authority=credentials.authority,
        )
    properties.write_text(text)
    if not (folder / "data" / "meta.properties").exists():
        passwords = {user: credentials.password(user) for user in (ADMIN, *users)} if credentials else {}
        _format(properties, passwords)
    return [*_java(), "kafka.Kafka", str(properties)]


def wait_until_up(bootstrap: str, *, settings: KafkaSettings | None = None) -> None:
    """Wait until the broker answers a client.

    Args:
        bootstrap: `host:port`.
        settings: credentials for a secured broker.

    Raises:
        TimeoutError: it did not answer in time.
    """
    deadline = time.monotonic() + UP_SECONDS
    host, port = bootstrap.rsplit(":", 1)
    # A client logs errors if nothing listens, so check first.
    listens(host, int(port), UP_SECONDS)
    asyncio.run(_answers(settings or KafkaSettings(kafka=bootstrap), deadline))


async def _answers(settings: KafkaSettings, deadline: float) -> None:
    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
        while True:
            client = AIOKafkaAdminClient(**access(settings))
            try:
                await client.start()
                await client.list_topics()
            except KafkaError:
                await asyncio.sleep(0.1)  # between two checks
            else:
                return
            finally:
                await client.close()


def _java() -> list[str]:
    return [*JAVA, f"{TOOLS / 'kafka'}/*"]


def _format(properties: Path, passwords: Mapping[str, str]) -> None:
    # A new id, by which the services detect a broker that has lost its data. It begins with a letter, since the tool
    # would parse a leading minus as an option.
    cluster_id = urlsafe_b64encode(b"scanflee" + os.urandom(8)).decode().rstrip("=")
    argv = [*_java(), "kafka.tools.StorageTool", "format", "--standalone", "--ignore-formatted"]
    argv += ["--cluster-id", cluster_id, "--config", str(properties)]
    for name, password in passwords.items():
        argv += ["--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Kafka could not format its data folder:\n{done.stdout}{done.stderr}")
