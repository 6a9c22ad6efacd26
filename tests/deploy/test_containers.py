"""The images and docker-compose.yml on a real engine: `make compose-test`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from local import compose
from local.client import Client
from local.paths import ROOT
from local.wait import until
from scanfleet.testing import targets

pytestmark = pytest.mark.compose

SERVICES: Final = sorted(path.name for path in (ROOT / "services").iterdir())
BASE: Final = "python:3.13-slim-trixie"
MB: Final = 1_000_000
PROMETHEUS: Final = "http://127.0.0.1:9090"
OPEN: Final = {(host, port) for port, _, hosts in targets.SERVERS for host in hosts}

# Programs that install others or give their caller another user's rights.
_TOOLS: Final = """
import importlib.util, json, os, pathlib, shutil
tools = [name for name in ("apt", "apt-get", "pip", "pip3") if shutil.which(name)]
modules = [name for name in ("pip", "ensurepip") if importlib.util.find_spec(name)]
files = [os.path.join(folder, name) for folder, _, names in os.walk("/usr") for name in names]
setuid = [file for file in files if not os.path.islink(file) and os.stat(file).st_mode & 0o6000]
print(json.dumps([*tools, *modules, *setuid]))
"""

# What a process inside can see: who runs what with which rights, and where something can be written.
_LOOK_AROUND: Final = """
import json, os, pathlib, re
seen = {"users": set(), "rights": set(), "programs": set(), "writable": set()}
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        status = (process / "status").read_text()
    except OSError:
        continue  # it has just ended
    seen["programs"].add(re.search(r"Name:\\s+(.*)", status)[1])
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
    """A user of the platform in containers, with three workers and servers for them to find."""
    assert not containers("api-gateway"), "the containers are in use: docker compose down"
    docker(*compose.COMPOSE[1:], "up", "--build", "--wait", "--scale", "scanner-worker=3")
    try:
        client = Client(compose.URL, compose.token(7))
        with client.http, compose.servers():
            yield client
    finally:
        docker(*compose.COMPOSE[1:], "--profile", "*", "down", "--volumes")


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_no_tool_of_an_intruder(service: str) -> None:
    """An image has no pip, no apt and no setuid program."""
    found = docker("run", "--rm", "--entrypoint", "python", f"scanfleet/{service}:dev", "-c", _TOOLS)
    assert json.loads(found) == []


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("service", SERVICES)
def test_an_image_is_small(service: str) -> None:
    """We add less than 120 MB to Python's own image, and 180 MB where nmap is in it."""
    added = inspect(f"scanfleet/{service}:dev")["Size"] - inspect(BASE)["Size"]
    assert added < (180 if service == "scanner-worker" else 120) * MB


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("service", SERVICES)
def test_an_image_says_what_it_is(service: str) -> None:
    """It has its labels, a user who is not root, and an entry and a health check that want no shell."""
    config = inspect(f"scanfleet/{service}:dev")["Config"]
    ours = {f"org.opencontainers.image.{name}" for name in ("title", "description", "licenses", "version", "revision")}
    assert ours <= config["Labels"].keys()
    assert config["Labels"]["org.opencontainers.image.title"] == f"scanfleet {service}"
    assert config["User"] == "65532:65532"
    assert (config["Entrypoint"][0], config["Cmd"]) == ("uvicorn", None)
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python"]


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_as_little_as_it_can_be(service: str) -> None:
    """While it works it is not root, has no right, no shell and nothing to write to but the worker's /tmp."""
    seen = json.loads(docker("exec", containers(service)[0], "python", "-c", _LOOK_AROUND))
    assert seen["users"] == [65532]
    assert seen["rights"] == ["0000000000000000"]
    assert set(seen["programs"]) <= {"uvicorn", "python", "nmap"}
    assert seen["writable"] == (["tmp"] if service == "scanner-worker" else [])


@pytest.mark.usefixtures("user")
def test_what_is_kept_has_a_name() -> None:
    """Every volume of every container is a named one, so that coming and going leaves nothing behind."""
    everything = docker(*compose.COMPOSE[1:], "ps", "--all", "--quiet").split()
    mounted = {mount["Name"] for each in everything for mount in inspect(each)["Mounts"] if mount["Type"] == "volume"}
    assert {name for name in mounted if not name.startswith("scanfleet_")} == set()


@pytest.mark.usefixtures("user")
def test_prometheus_asks_every_process_and_understands_every_rule() -> None:
    """Each container of each service answers Prometheus, and every alert has been evaluated without an error."""
    docker(*compose.COMPOSE[1:], "up", "--detach", "prometheus")
    with httpx.Client(base_url=PROMETHEUS) as prometheus:

        def asked() -> list[str]:
            targets = prometheus.get("/api/v1/targets", params={"state": "active"}).json()["data"]["activeTargets"]
            return sorted(target["labels"]["service"] for target in targets if target["health"] == "up")

        def rules() -> list[str]:
            groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
            return [rule["health"] for group in groups for rule in group["rules"]]

        def is_ready() -> bool:
            try:
                return prometheus.get("/-/ready").is_success
            except httpx.TransportError:  # the engine listens for it before it does
                return False

        until(is_ready, 60, "Prometheus to be ready")
        running = sorted(service for service in SERVICES for _ in containers(service))
        until(lambda: asked() == running, 60, "Prometheus to ask everyone")
        until(lambda: "unknown" not in rules(), 60, "every rule to be evaluated")
        assert set(rules()) == {"ok"}


def test_a_scan_finds_what_is_there(user: Client) -> None:
    """Three workers find every server and nothing else."""
    job_id = user.scan("127.9.8.0/24", ports=",".join(map(str, targets.USUAL)), **CONNECT)
    assert user.finished(job_id)["status"]["status"] == "completed"
    assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == OPEN


def test_a_worker_that_is_killed_costs_nothing_but_time(user: Client) -> None:
    """With a worker killed in the middle every server is found, once, and every probe accounted for."""
    job_id = user.scan("127.9.8.0/24", ports="2000-2600,6300-6400,8000", discovery="none", max_rate=2000, **CONNECT)
    until(lambda: user.task(job_id)["status"]["progress"] > 0, 60, "the scan to be under way")
    docker("kill", containers("scanner-worker")[-1])
    assert user.finished(job_id, limit=300)["status"]["status"] == "completed"
    found = [(each["ip_address"], each["port"]) for each in user.results(job_id)]
    assert len(found) == len(set(found))
    assert set(found) == OPEN
    ledger = user.ledger(job_id)
    assert ledger["accounted"]
    assert ledger["counts"]["answered"] == ledger["request"]["probes"]


_POISON: Final = """
import asyncio
from scanfleet.kafka import KafkaBus
from scanfleet.settings import KafkaSettings
async def send():
    bus = KafkaBus(KafkaSettings(), source="test", instance="test")
    await bus.start()
    await bus.send("scan-progress", [(b"k", b"poison", [])])
    await bus.stop()
asyncio.run(send())
"""


def types(command: str, folder: Path) -> str:
    """What an operator's shell prints; the commands find the project's containers, and files are in `folder`."""
    environment = os.environ | {"COMPOSE_FILE": str(ROOT / "docker-compose.yml")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


@pytest.mark.usefixtures("user")
def test_dead_letters_are_looked_after(commands: Mapping[str, list[str]], tmp_path: Path) -> None:
    """The commands of the page list, show and replay a letter."""
    list_, show, replay, replay_all = commands["Dead letters"]
    docker(*compose.COMPOSE[1:], "run", "--rm", "-T", "--entrypoint", "python", "topics", "-c", _POISON)
    until(lambda: "scan-progress-dlq/0/0" in types(list_, tmp_path), 60, "the letter to be there")
    assert "value: poison" in types(show, tmp_path)
    assert types(replay, tmp_path) == "scan-progress-dlq/0/0 was sent to scan-progress\n"
    assert "scan-progress-dlq/0/0 was sent to scan-progress\n" in types(replay_all, tmp_path)


def test_audit_log_is_verified_and_exported(user: Client, commands: Mapping[str, list[str]], tmp_path: Path) -> None:
    """The commands of the page verify the log, export it, and find a head that was kept."""
    verify, export, verify_head = commands["The audit log"]
    user.scan("127.9.8.0/28", ports="8000", **CONNECT)
    until(lambda: " 0 blocks" not in f" {types(verify, tmp_path)}", 60, "the first block to be sealed")
    head = types(verify, tmp_path).strip().rpartition("head ")[2]
    types(export.replace("--after 1200", "--after 0"), tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert "create_tasks" in {each["action"] for each in entries}
    assert "removed or replaced" not in types(verify_head.replace("1250/4f0c1d2e:9b…", head), tmp_path)


def test_a_backup_is_restored(user: Client, commands: Mapping[str, list[str]], tmp_path: Path) -> None:
    """The commands of the page copy the databases and set them back: a job from before reads the same, one since is gone."""
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
