"""Two releases running concurrently: this checkout, the previous release, and this checkout with a field added to its contracts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import pytest

from local.wait import until
from scanfleet.contracts.messages.topics import (
    SCAN_COMMANDS,
    SCAN_EVENTS,
    SCAN_PROGRESS,
    SCAN_RESULTS,
    SCAN_STORED,
    SCAN_TASKS,
    TOPICS,
    Topic,
)
from scanfleet.services import SERVICES
from tests.faults.conftest import Shared
from tests.faults.invariants import Invariants
from tests.faults.kit import LIMIT_SECONDS, REPLICAS, STEADY, TINY, Caller, Platform, assert_scanned_once, scanned
from tests.faults.releases import FIELD, ROOT, copy_packages

pytestmark = pytest.mark.e2e

PUBLISHED: Final = (SCAN_COMMANDS, SCAN_TASKS, SCAN_PROGRESS, SCAN_RESULTS, SCAN_STORED, SCAN_EVENTS)


def previous_release(folder: Path) -> Path | None:
    """Extract the services and shared packages of the latest commit before this one that changed the version.

    Returns:
        their root; None if the history of this checkout has no such commit.
    """
    version = ("-G^VERSION", "HEAD^", "--", "shared/scanfleet/__init__.py")
    found = subprocess.run(["git", "log", "-1", "--format=%H", *version], cwd=ROOT, capture_output=True, check=False)
    commit = found.stdout.decode().strip()
    if not commit:
        return None
    archive = subprocess.run(
        ["git", "archive", commit, "shared", "services"], cwd=ROOT, capture_output=True, check=True
    )
    folder.mkdir(parents=True)
    # Not by tarfile, whose filter Python 3.11.2 of Debian 12 does not have, and which 3.12 warns about without one.
    subprocess.run(["tar", "--extract", "--directory", folder], input=archive.stdout, check=True)
    return folder


class Rolling(Platform):
    """A platform whose processes may run either release."""

    def __init__(self, folder: Path) -> None:
        previous = previous_release(folder / "previous")
        if previous is None:
            pytest.skip("the history of this checkout has no previous release: git fetch --unshallow")
        super().__init__(folder)
        copy_packages(previous, self._releases / "previous")
        for name in self._names:
            (self._releases / name).symlink_to("previous")

    @property
    def _names(self) -> list[str]:
        return [f"{service}-{number + 1}" for service in SERVICES for number in range(REPLICAS[service])]

    def _settings_of(self) -> dict[str, dict[str, str | None]]:
        found = super()._settings_of()
        for name in self._names:
            found.setdefault(name, {})["PYTHONPATH"] = str(self._releases / name)
        return found

    def change(self, name: str, release: str) -> None:
        """Shut a process down gracefully, and start it again from `release`."""
        self.stack.stop(name)
        (self._releases / name).unlink()
        (self._releases / name).symlink_to(release)
        self.stack.start(name)
        self.stack.wait_until_ready()


@pytest.fixture(scope="module")
def rolling(shared: Shared[Platform]) -> Iterator[Shared[Rolling]]:
    with shared.replaced(Rolling) as found:
        yield found


def refused(platform: Platform) -> float:
    """Return the number of records that the running processes have dead-lettered or skipped."""
    names = ("scanfleet_bus_dead_lettered_total", "scanfleet_bus_skipped_total")
    return sum(platform.metric(service, name) for service in SERVICES for name in names)


def of_next_release(platform: Platform, jobs: Collection[int]) -> set[int]:
    """Return those of the jobs that a process of the next release has accepted."""
    made = [job for command in platform.documents.commands(state="accepted") for job in command["jobs"]]
    return {job["_id"] for job in made if FIELD in job} & set(jobs)


def complete(platform: Platform, jobs: Collection[int]) -> set[int]:
    """Return those of the jobs whose documents have the field of the next release."""
    return {job["_id"] for job in platform.documents.jobs() if FIELD in job and FIELD in job["totals"]} & set(jobs)


@pytest.mark.proves("F28", "G10")
def test_jobs_on_processes_of_two_releases_lose_nothing(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """Jobs complete on processes of two releases, no record is dead-lettered, and no field is erased."""
    before = refused(platform)
    callers = (user, platform.caller(gateway="api-gateway-2"))
    jobs: list[int] = []

    def published(topic: Topic) -> bool:
        return len({FIELD.encode() in (each.value or b"") for each in platform.topics.records(topic)}) > 1

    def both_work() -> bool:
        """Scan through both gateways; return whether both releases have accepted jobs and published in each topic."""
        for caller in callers:
            subnets = [caller.subnet(platform.network(28)) for _ in range(4)]  # their jobs have different owners
            for job in caller.submit(subnets, caller.policy(**TINY)):
                _, found = scanned(caller, job["id"])
                assert {(address, int(port)) for address, _, port, *_ in found} == servers
                jobs.append(job["id"])
        return 0 < len(of_next_release(platform, jobs)) < len(jobs) and all(map(published, PUBLISHED))

    with platform.listeners((1, 7)) as servers:
        until(both_work, LIMIT_SECONDS, "both releases to work")
    invariants.check()
    assert_scanned_once(platform, jobs)
    assert refused(platform) == before
    assert complete(platform, jobs) >= of_next_release(platform, jobs)
    callers[1].close()


@pytest.mark.long
@pytest.mark.proves("F28", "G10")
def test_rolling_upgrade_and_rollback_during_scans_lose_nothing(rolling: Shared[Rolling]) -> None:
    """During a rolling upgrade and rollback scans complete, no record is dead-lettered, and no field is erased."""
    platform, invariants = rolling.lend()
    user = platform.caller()
    # One order for both: a service runs the newer release beside older ones in the upgrade, and the older one in the rollback.
    names = [name for service in SERVICES for name in platform.names(service)]
    with platform.listeners() as servers:
        jobs = [user.scan(platform.network(24), **STEADY)]
        for release in ("next", "previous"):
            for name in names:
                platform.change(name, release)
                if user.status(jobs[-1]) == "completed":
                    jobs.append(user.scan(platform.network(24), **STEADY))
            jobs.append(user.scan(platform.network(24), **STEADY))  # all processes are of one release again
            until(lambda: bool(platform.nmaps()), LIMIT_SECONDS, "a scan to run")
        for job_id in jobs:
            assert user.finished(job_id)["status"]["status"] == "completed"
            assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    invariants.check()
    assert_scanned_once(platform, jobs)
    assert not any(platform.topics.records(topic, letters=True) for topic in TOPICS)
    tasks = [record.value or b"" for record in platform.topics.records(SCAN_TASKS)]
    assert any(FIELD.encode() in task and json.loads(task)["job_id"] in jobs for task in tasks)
    written = of_next_release(platform, jobs)
    assert written
    assert complete(platform, jobs) >= written
    user.close()
