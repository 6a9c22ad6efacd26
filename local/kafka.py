"""One-node Kafka in KRaft mode: how to start it and how to know that it is up.

Nothing here starts or stops the broker for good: the stack hands `command` to its supervisor, the tests to a subprocess.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from local.paths import TOOLS
from local.wait import listens

PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={data}
# A topic that nobody declared is a bug, not a wish.
auto.create.topics.enable=false
# One node holds everything.
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# A first consumer need not wait for others that might come.
group.initial.rebalance.delay.ms=0
# A broker that comes back after a kill waits until its controller has given up the one before (9 s by default).
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# One broker serves a handful of groups; fifty partitions would only slow its start.
offsets.topic.num.partitions=8
"""

JAVA = (
    "java",
    "-Xmx512m",
    "-XX:+UseSerialGC",  # the collector with the fewest threads
    "-XX:TieredStopAtLevel=1",  # compiling for the long run would cost a third of the time to start
    "-Dlog4j2.level=WARN",
    "-cp",
)


def command(folder: Path, port: int, controller_port: int) -> list[str]:
    """The command that runs the broker in the foreground, its data under `folder`, which is formatted on first use.

    Raises:
        RuntimeError: the folder could not be formatted; says what Kafka said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    properties = folder / "server.properties"
    properties.write_text(PROPERTIES.format(port=port, controller_port=controller_port, data=folder / "data"))
    if not (folder / "data" / "meta.properties").exists():
        _format(properties)
    return [*_java(), "kafka.Kafka", str(properties)]


def wait_until_up(bootstrap: str, limit: float = 120.0) -> None:
    """Return when the broker answers a client.

    Args:
        bootstrap: `host:port`.
        limit: seconds; a broker that recovers a large log after a kill takes its time.

    Raises:
        TimeoutError: it did not answer in time.
    """
    deadline = time.monotonic() + limit
    host, port = bootstrap.rsplit(":", 1)
    # A client that finds no listener logs errors, so look before asking.
    listens(host, int(port), limit)
    asyncio.run(_answers(bootstrap, deadline))


async def _answers(bootstrap: str, deadline: float) -> None:
    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
        while True:
            client = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
            try:
                await client.start()
                await client.list_topics()
            except KafkaError:
                await asyncio.sleep(0.1)  # between two looks
            else:
                return
            finally:
                await client.close()


def _java() -> list[str]:
    return [*JAVA, f"{TOOLS / 'kafka'}/*"]


def _format(properties: Path) -> None:
    # The same id always: it only tells clusters apart that could meet, and this one is alone on loopback.
    argv = [*_java(), "kafka.tools.StorageTool", "format", "--standalone", "--ignore-formatted"]
    argv += ["--cluster-id", "c2NhbmZsZWV0LWxvY2FsLQ", "--config", str(properties)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Kafka could not format its data folder:\n{done.stdout}{done.stderr}")
