"""Real Kafka and MongoDB for every test that asks: once a session, in containers or from this machine's binaries."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from testcontainers.community.kafka import KafkaContainer
from testcontainers.core.container import DockerContainer
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from local import kafka as native_kafka
from local import mongod as native_mongod
from local import ports

# No test asserts on speed, and a machine that is busy with a broker is slow now and then.
settings.register_profile("scanfleet", deadline=None)
settings.load_profile("scanfleet")

KAFKA_IMAGE = "confluentinc/cp-kafka:7.6.0"
MONGODB_IMAGE = "mongo:7.0"
TEST_COMMANDS = ("--setParameter", "enableTestCommands=1")  # failCommand, which lets a server answer with any error
START = 120  # seconds that a container may take to be up on a busy machine
STOP = 30  # seconds in which a server must end by itself


# What scans, or starts servers to be scanned, goes one after another: each would find the others' servers. The faults and the
# networks have addresses of their own, and much of their time they wait. The third process has all the rest.
PARTS = {
    "faults": ("tests/faults",),
    "networks": ("tests/networks",),
    "page": ("tests/page",),
    "scanning": (
        "local/tests",
        "shared/tests/integration/test_nmap.py",
        "services/api-gateway/tests/integration",
        "services/scanner-worker/tests/integration",
        "tests/abuse",
        "tests/e2e",
        "tests/security",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest parts go first."""
    items.sort(key=lambda item: [*PARTS, name := part(item.nodeid)].index(name))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Where tests run side by side those of a part stay together, and so do those of any other file."""

    class Parts(LoadScopeScheduling):  # type: ignore[misc] # the plugin ships no types
        def _split_scope(self, nodeid: str) -> str:
            return part(nodeid)

    return Parts(config, log)


def part(nodeid: str) -> str:
    path = nodeid.split("::", maxsplit=1)[0]
    return next((name for name, paths in PARTS.items() if path.startswith(paths)), path)


@pytest.fixture(scope="session")
def docker_answers() -> bool:
    """Whether containers can be had; without an engine the same servers run natively."""
    client = shutil.which("docker")
    return client is not None and subprocess.run([client, "info"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def kafka(docker_answers: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap address of a real broker; each test takes a topic prefix of its own."""
    if docker_answers:
        container = KafkaContainer(KAFKA_IMAGE).with_kraft()
        try:
            yield container.start(timeout=START).get_bootstrap_server()
        finally:
            container.stop()
        return
    folder = tmp_path_factory.mktemp("kafka")
    port, controller_port = ports.choose(), ports.choose()
    with _running(native_kafka.command(folder, port, controller_port), folder):
        native_kafka.wait_until_up(f"127.0.0.1:{port}")
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="session")
def mongodb(docker_answers: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a real replica set; each test takes a database name of its own."""
    if docker_answers:
        container = DockerContainer(MONGODB_IMAGE)
        container.with_command(f"--replSet {native_mongod.REPLICA_SET} --bind_ip_all {' '.join(TEST_COMMANDS)}")
        container.with_exposed_ports(27017)
        with container:
            address = f"{container.get_container_host_ip()}:{container.get_exposed_port(27017)}"
            native_mongod.make_ready(address, member="127.0.0.1:27017")
            yield native_mongod.uri(address)
        return
    folder = tmp_path_factory.mktemp("mongod")
    port = ports.choose()
    with _running([*native_mongod.command(folder, port), *TEST_COMMANDS], folder):
        native_mongod.make_ready(f"127.0.0.1:{port}")
        yield native_mongod.uri(f"127.0.0.1:{port}")


@contextmanager
def _running(command: list[str], folder: Path) -> Iterator[None]:
    """A server for the length of the block; it dies with us even if we are killed."""
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            server.terminate()
            try:
                server.wait(STOP)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
