"""The images and docker-compose.yml on a real engine: `make compose-test`."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from local import compose, targets
from local.paths import ROOT
from local.wait import until
from scanfleet.services import IMAGES, SERVICES, WITH_API
from tests.client import Client
from tests.deploy.container_programs import REACHED

pytestmark = pytest.mark.compose

PROJECT: Final = "scanfleet-test"
"""The project of the tests, which has its own volumes: those of docker-compose.yml's own project are the user's data."""
BASE: Final = "python:3.13-slim-trixie"
MB: Final = 1_000_000
PROMETHEUS: Final = "http://127.0.0.1:9090"
OPEN: Final = {(host, port) for port, _, hosts in targets.SERVERS for host in hosts}

# Programs that install packages, or that run with another user's privileges.
_TOOLS: Final = """
import importlib.util, json, os, pathlib, shutil
tools = [name for name in ("apt", "apt-get", "pip", "pip3") if shutil.which(name)]
modules = [name for name in ("pip", "ensurepip") if importlib.util.find_spec(name)]
files = [os.path.join(folder, name) for folder, _, names in os.walk("/usr") for name in names]
setuid = [file for file in files if not os.path.islink(file) and os.stat(file).st_mode & 0o6000]
print(json.dumps([*tools, *modules, *setuid]))
"""

# The view of a process inside: users, capabilities, programs and writable folders.
_PACKAGES: Final = (
    "import json, pathlib; print(json.dumps([path.parent.name for path in pathlib.Path('/app').glob('*/__init__.py')]))"
)

_LOOK_AROUND: Final = """
import json, os, pathlib, re
seen = {"users": set(), "rights": set(), "programs": set(), "writable": set()}
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        status = (process / "status").read_text()
    except OSError:
        continue  # it has just ended
    name = re.search(r"Name:\\s+(.*)", status)[1]
    if name.startswith("runc:"):
        continue  # the engine's, which becomes a health check
    seen["programs"].add(name)
    seen["users"].update(map(int, re.search(r"Uid:(.*)", status)[1].split()))
    seen["rights"].update(re.findall(r"Cap(?:Prm|Eff|Bnd):\\s+(.*)", status))
for folder, _, _ in os.walk("/"):
    if not folder.startswith(("/proc", "/sys", "/dev")) and os.access(folder, os.W_OK):
        seen["writable"].add(folder.split("/")[1])
print(json.dumps({name: sorted(values) for name, values in seen.items()}))
"""

CONNECT: Final[dict[str, Any]] = {"technique": "connect", "service_detection": False}


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def inspect(name: str) -> dict[str, Any]:
    (found,) = json.loads(docker("inspect", name))
    return dict(found)


def containers(service: str) -> list[str]:
    return docker(*compose.COMPOSE[1:], "ps", "--quiet", service).split()


@pytest.fixture(scope="module")
def user() -> Iterator[Client]:
    """Yield a user of the platform in containers, with three workers and servers to find."""
    assert not containers("api-gateway"), "the containers are in use: docker compose down"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSE_PROJECT_NAME", PROJECT)
        docker(*compose.COMPOSE[1:], "--profile", "tools", "build")
        try:
            docker(*compose.COMPOSE[1:], "up", "--wait", "--scale", "scanner-worker=3")
            client = Client(compose.URL, compose.token(7))
            with client.http, compose.servers():
                yield client
        finally:
            docker(*compose.COMPOSE[1:], "--profile", "*", "down", "--volumes")


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("image", IMAGES)
def test_images_have_no_installers_and_setuid_programs(image: str) -> None:
    """An image has no pip, no apt and no setuid program."""
    found = docker("run", "--rm", "--entrypoint", "python", f"scanfleet/{image}:dev", "-c", _TOOLS)
    assert json.loads(found) == []


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("image", IMAGES)
def test_images_contain_the_runtime_packages_only(image: str) -> None:
    """Of the project's code an image has the shared library and its own package."""
    found = docker("run", "--rm", "--entrypoint", "python", f"scanfleet/{image}:dev", "-c", _PACKAGES)
    assert set(json.loads(found)) == {"scanfleet", SERVICES[image].package if image in SERVICES else "scanfleet_cli"}


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("image", IMAGES)
def test_image_size_is_bounded(image: str) -> None:
    """The image adds less than 120 MB to Python's image, or 180 MB with nmap."""
    added = inspect(f"scanfleet/{image}:dev")["Size"] - inspect(BASE)["Size"]
    assert added < (180 if image == "scanner-worker" else 120) * MB


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("image", IMAGES)
def test_images_have_labels_user_and_health_check(image: str) -> None:
    """The image has labels, a non-root user, and an entry point and, of a service, a health check without a shell."""
    config = inspect(f"scanfleet/{image}:dev")["Config"]
    ours = {f"org.opencontainers.image.{name}" for name in ("title", "description", "licenses", "version", "revision")}
    assert ours <= config["Labels"].keys()
    assert config["Labels"]["org.opencontainers.image.title"] == f"scanfleet {image}"
    assert config["User"] == "65532:65532"
    if image not in SERVICES:
        assert config["Entrypoint"] == ["python", "-m", "scanfleet_cli"]
        assert not {"Cmd", "Healthcheck", "ExposedPorts"} & {name for name, value in config.items() if value}
        return
    assert (config["Entrypoint"], config["Cmd"]) == (["python", "-m", "scanfleet.runtime.server"], [image])
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python"]


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("service", SERVICES)
def test_running_containers_have_minimal_privileges(service: str) -> None:
    """A running container is not root, and has no capability, no shell and no writable folder except the worker's /tmp."""
    seen = json.loads(docker("exec", containers(service)[0], "python", "-c", _LOOK_AROUND))
    assert seen["users"] == [65532]
    assert seen["rights"] == ["0000000000000000"]
    assert set(seen["programs"]) <= {"python", "nmap"}
    assert seen["writable"] == (["tmp"] if service == "scanner-worker" else [])


@pytest.mark.usefixtures("user")
def test_worker_container_reaches_kafka_only() -> None:
    """Of all that listens in the other containers a worker can open Kafka's port."""
    ports = {"kafka": 9092, "mongodb": 27017, **dict.fromkeys(WITH_API, 8080)}
    listening = (f"{name}:{port}" for name, port in ports.items())
    assert docker("exec", containers("scanner-worker")[0], "python", "-c", REACHED, *listening) == "kafka"


@pytest.mark.usefixtures("user")
def test_container_volumes_are_named() -> None:
    """Every volume of every container is named, so that recreated containers leave no anonymous volumes."""
    everything = docker(*compose.COMPOSE[1:], "ps", "--all", "--quiet").split()
    mounted = {mount["Name"] for each in everything for mount in inspect(each)["Mounts"] if mount["Type"] == "volume"}
    assert {name for name in mounted if not name.startswith(f"{PROJECT}_")} == set()


@pytest.mark.usefixtures("user")
def test_prometheus_scrapes_all_services_and_evaluates_all_rules() -> None:
    """Prometheus scrapes each container of each service, and evaluates every alert without an error."""
    docker(*compose.COMPOSE[1:], "up", "--detach", "prometheus")
    with httpx2.Client(base_url=PROMETHEUS) as prometheus:

        def asked() -> list[str]:
            targets = prometheus.get("/api/v1/targets", params={"state": "active"}).json()["data"]["activeTargets"]
            return sorted(target["labels"]["service"] for target in targets if target["health"] == "up")

        def rules() -> list[str]:
            groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
            return [rule["health"] for group in groups for rule in group["rules"]]

        def is_ready() -> bool:
            try:
                return prometheus.get("/-/ready").is_success
            except httpx2.TransportError:  # the engine's port is open before Prometheus listens
                return False

        until(is_ready, 60, "Prometheus to be ready")
        running = sorted(service for service in SERVICES for _ in containers(service))
        until(lambda: asked() == running, 60, "Prometheus to ask everyone")
        until(lambda: "unknown" not in rules(), 60, "every rule to be evaluated")
        assert set(rules()) == {"ok"}


def test_scan_finds_every_server(user: Client) -> None:
    """Three workers find every server and nothing else."""
    job_id = user.scan("127.9.8.0/24", ports=",".join(map(str, targets.USUAL)), **CONNECT)
    assert user.finished(job_id)["status"]["status"] == "completed"
    assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == OPEN


def test_command_line_scans_from_its_container(user: Client) -> None:
    """The documented container of the command line scans, with the token of its environment, and prints the open ports."""
    argv = ["run", "--rm", "-T", "cli", "-q", "scan", "127.9.8.0/28", "--ports", "2222,8000", "--preset", "quick"]
    done = subprocess.run(
        [*compose.COMPOSE, *argv, "--json", "ip_address,port"],
        check=True,
        env=os.environ | {"SCANFLEET_TOKEN": user.token},
        stdout=subprocess.PIPE,
    )
    found = {(each["ip_address"], each["port"]) for each in json.loads(done.stdout)}
    assert found == {(f"127.9.8.{host}", port) for host, port in ((0, 8000), (1, 2222), (10, 2222), (10, 8000))}


def test_killed_worker_loses_no_result(user: Client) -> None:
    """With a worker killed in mid-scan every server is found, once, and every probe is accounted for."""
    job_id = user.scan("127.9.8.0/24", ports="2000-2600,6300-6400,8000", discovery="none", max_rate=2000, **CONNECT)
    until(lambda: user.task(job_id)["status"]["progress"] > 0, 60, "the scan to be under way")
    docker("kill", containers("scanner-worker")[-1])
    assert user.finished(job_id, limit_seconds=300)["status"]["status"] == "completed"
    found = [(each["ip_address"], each["port"]) for each in user.results(job_id)]
    assert len(found) == len(set(found))
    assert set(found) == OPEN
    ledger = user.ledger(job_id)
    assert ledger["accounted"]
    assert ledger["counts"]["answered"] == ledger["request"]["probes"]


_POISON: Final = """
import asyncio
from scanfleet.kafka import KafkaBus
from scanfleet.runtime.settings import KafkaSettings
async def send():
    bus = KafkaBus(KafkaSettings(), source="test", instance="test")
    await bus.start()
    await bus.send("scan-progress", [(b"k", b"poison", [])])
    await bus.stop()
asyncio.run(send())
"""


def types(command: str, folder: Path) -> str:
    """Return the output of an operator's command, with the project's containers and files in `folder`."""
    environment = os.environ | {"COMPOSE_FILE": str(ROOT / "docker-compose.yml")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


@pytest.mark.usefixtures("user")
def test_dead_letter_commands_work(commands: Mapping[str, list[str]], tmp_path: Path) -> None:
    """The documented commands list, show and replay a dead letter, and replay one whose record is gone."""
    list_, show, replay, replay_all, replay_unverified = commands["Dead letters"]
    docker(*compose.COMPOSE[1:], "run", "--rm", "-T", "--entrypoint", "python", "topics", "-c", _POISON)
    until(lambda: "scan-progress-dlq/0/0" in types(list_, tmp_path), 60, "the letter to be there")
    assert "value: poison" in types(show, tmp_path)
    assert types(replay, tmp_path) == "scan-progress-dlq/0/0 was sent to scan-progress\n"
    assert "scan-progress-dlq/0/0 was sent to scan-progress\n" in types(replay_all, tmp_path)
    until(lambda: "scan-progress-dlq/0/1" in types(list_, tmp_path), 60, "the replayed letter to be refused again")
    assert types(replay_unverified, tmp_path) == "scan-progress-dlq/0/1 was sent to scan-progress\n"


def test_audit_log_is_verified_and_exported(user: Client, commands: Mapping[str, list[str]], tmp_path: Path) -> None:
    """The documented commands verify and export the audit log, and check an earlier head."""
    verify, export, verify_head = commands["The audit log"]
    user.scan("127.9.8.0/28", ports="8000", **CONNECT)
    until(lambda: " 0 blocks" not in f" {types(verify, tmp_path)}", 60, "the first block to be sealed")
    head = types(verify, tmp_path).strip().rpartition("head ")[2]
    types(export.replace("--after 1200", "--after 0"), tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert "create_tasks" in {each["action"] for each in entries}
    assert "removed or replaced" not in types(verify_head.replace("1250/4f0c1d2e:9b…", head), tmp_path)


def test_backup_commands_restore_the_databases(user: Client, commands: Mapping[str, list[str]], tmp_path: Path) -> None:
    """The documented commands back up and restore the databases: an old job is unchanged, a newer one is gone."""
    job_id = user.scan("127.9.8.0/28", ports="8000", **CONNECT)
    user.finished(job_id)
    before = user.task(job_id), user.results(job_id)
    steps = commands["Back up and restore"]
    for step in steps[:3]:
        types(step, tmp_path)
    since = user.scan("127.9.8.0/28", ports="8000", **CONNECT)
    user.finished(since)
    for step in steps[3:]:
        types(step, tmp_path)
    assert (user.task(job_id), user.results(job_id)) == before
    assert user.http.get(f"/api/v1/task/{since}").status_code == 404
    fresh = user.scan("127.9.8.0/28", ports="8000", **CONNECT)
    assert fresh > since
    assert user.finished(fresh)["status"]["status"] == "completed"


def command_of(file: str) -> str:
    """Return the command in the comment of an override file that applies it."""
    comment = " ".join(re.findall(r"^# ?(.*)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
    (command,) = re.findall(r"`([^`]*docker compose [^`]*)`", comment)
    return str(command)


def test_raw_packets_file_enables_syn_scans(user: Client) -> None:
    """With docker-compose.raw-packets.yml a SYN scan finds every server, and only nmap can send raw packets."""
    before = containers("api-gateway")
    types(command_of("docker-compose.raw-packets.yml"), ROOT)
    assert containers("api-gateway") == before
    with compose.servers():
        job_id = user.scan("127.9.8.0/24", ports=",".join(map(str, targets.USUAL)), **CONNECT | {"technique": "syn"})
        assert user.finished(job_id)["status"]["status"] == "completed"
        assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == OPEN
    for worker in containers("scanner-worker"):
        seen = json.loads(docker("exec", worker, "python", "-c", _LOOK_AROUND))
        assert seen["users"] == [65532]
        assert seen["rights"] == ["0000000000000000", "0000000000002000"]  # NET_RAW in the bounding set only
        assert seen["writable"] == ["tmp"]


def test_grants_file_limits_a_user(user: Client, tmp_path: Path) -> None:
    """With docker-compose.grants.yml a user scans the networks of their grant only, and no container can write the file."""
    file = tmp_path / "grants.toml"
    file.write_text('[[grants]]\nname = "lab"\nusers = [7]\nnetworks = ["127.9.8.0/28"]\n')
    types(command_of("docker-compose.grants.yml").replace("grants.toml", str(file)), ROOT)
    job_id = user.scan("127.9.8.0/28", ports="8000", **CONNECT)
    assert user.finished(job_id)["status"]["status"] == "completed"
    with pytest.raises(httpx2.HTTPStatusError, match="403"):
        user.scan("127.9.8.0/27", ports="8000", **CONNECT)
    for service in ("api-gateway", "job-orchestrator", "scanner-worker"):
        (mount,) = (each for each in inspect(containers(service)[0])["Mounts"] if each["Destination"] == "/grants.toml")
        assert (mount["Source"], mount["RW"]) == (str(file), False)
