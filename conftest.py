"""Fixtures for real Kafka and MongoDB servers, one per session: in containers, or from binaries on this machine."""

from __future__ import annotations

import gc
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
from hypothesis import settings
from testcontainers.community.kafka import KafkaContainer
from testcontainers.core.container import DockerContainer
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from local import kafka as native_kafka
from local import mongod as native_mongod
from local import ports

# No test asserts on speed, and a machine that runs a broker can be slow.
settings.register_profile("scanfleet", deadline=None)
settings.load_profile("scanfleet")

KAFKA_IMAGE = "confluentinc/cp-kafka:7.6.0"
MONGODB_IMAGE = "mongo:7.0"
TEST_COMMANDS = ("--setParameter", "enableTestCommands=1")  # failCommand, which makes a server return a given error
START_SECONDS = 120  # of a container, for a busy machine
STOP_SECONDS = 30  # of a server


# The tests of a part run in one process: they share a stack, or they scan addresses where another test of the part has servers.
# No two parts have servers at the same addresses. A file belongs to the part with the longest matching path; the longest parts
# come first, so that the files outside all parts fill the rest of the time.
PARTS = {
    "faults": ("tests/faults",),
    "platforms": ("tests/abuse", "tests/e2e", "tests/security"),
    "lasting faults": (
        "tests/faults/test_soak.py",
        "tests/faults/test_startup.py",
        "tests/faults/test_environment.py",
        "tests/faults/test_upgrade.py",
    ),
    "servers": (
        "local/tests",
        "shared/tests/integration/test_nmap.py",
        "services/api-gateway/tests/integration",
        "services/scanner-worker/tests/integration",
    ),
    "networks": ("tests/networks",),
    "page": ("tests/page",),
}


def pytest_collection_finish() -> None:
    """Keep the thousands of collected items out of garbage collections, which would add to every bound of CPU time and memory."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def uncached_loggers() -> Iterator[None]:
    """Keep `structlog.testing.capture_logs` effective: it does not see a logger cached under an earlier configuration."""
    configure = structlog.configure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", lambda **named: configure(**named | {"cache_logger_on_first_use": False}))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest parts first."""
    items.sort(key=lambda item: [*PARTS, name := part(item.nodeid)].index(name))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Keep the tests of a part in one process in parallel runs, and those of every other file."""

    class Parts(LoadScopeScheduling):  # type: ignore[misc] # the plugin ships no types
        def _split_scope(self, nodeid: str) -> str:
            return part(nodeid)

    return Parts(config, log)


def part(nodeid: str) -> str:
    path = nodeid.split("::", maxsplit=1)[0]
    matching = {prefix: name for name, prefixes in PARTS.items() for prefix in prefixes if path.startswith(prefix)}
    return matching[max(matching, key=len)] if matching else path


@pytest.fixture(scope="session")
def docker_answers() -> bool:
    """Return whether a Docker engine is available; without one the same servers run natively."""
    client = shutil.which("docker")
    return client is not None and subprocess.run([client, "info"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def kafka(docker_answers: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Provide the bootstrap address of a real broker; each test uses its own topic prefix."""
    if docker_answers:
        container = KafkaContainer(KAFKA_IMAGE).with_kraft()
        container.with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")  # as everywhere else
        try:
            yield container.start(timeout=START_SECONDS).get_bootstrap_server()
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
    """Provide the URI of a real replica set; each test uses its own database name."""
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
    """Run a server for the duration of the block; it ends with this process, even if that is killed."""
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
