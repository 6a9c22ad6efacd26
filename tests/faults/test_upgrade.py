"""Two releases running concurrently: the previous one, and the code of this checkout with a field added to the contracts in `GROWN`."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from local.wait import until
from scanfleet.contracts.messages.topics import SCAN_TASKS, TOPICS
from scanfleet.services import SERVICES
from tests.faults.conftest import Shared
from tests.faults.kit import LIMIT, REPLICAS, STEADY, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.long]

ROOT: Final = Path(__file__).parents[2]
FIELD: Final = "added_by_the_next_release"
# The position of a class's own fields: after its docstring and an optional configuration.
GROWN: Final = {
    "scanfleet/scanning/policy.py": r"class ScanPolicy\(BaseModel\):.*?model_config = [^\n]*\n",
    "scanfleet/contracts/messages/chunks.py": r'class ScanChunk\(_Fenced\):\n    """.*?"""\n',
    "scanfleet/contracts/messages/jobs.py": r'class JobEvent\(Message\):\n    """.*?"""\n',
    "scanfleet/contracts/messages/results.py": r'class HostScanned\(_Fenced\):\n    """.*?"""\n',
    "job_orchestrator/domain/job.py": r'class ScanJob:\n    """.*?"""\n',
    "job_orchestrator/domain/totals.py": r'class Totals:\n    """.*?"""\n',
    "job_orchestrator/domain/chunk.py": r'class Chunk:\n    """.*?"""\n',
}


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
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def copy_packages(root: Path, folder: Path) -> None:
    for package in (root / "shared/scanfleet", *root.glob("services/*/*_*/")):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))


def write_next_release(folder: Path) -> None:
    """Copy the services and shared packages of this checkout, and add an optional field to documents and messages."""
    copy_packages(ROOT, folder)
    for file, begins in GROWN.items():
        path = folder / file
        text, count = re.subn(
            begins,
            lambda match: f'{match[0]}\n    {FIELD}: str = "by default"\n',
            path.read_text(encoding="utf-8"),
            count=1,
            flags=re.DOTALL,
        )
        assert count == 1, file
        path.write_text(text, encoding="utf-8")


class Rolling(Platform):
    """A platform whose processes may run either release."""

    def __init__(self, folder: Path) -> None:
        self._releases = folder / "releases"
        previous = previous_release(folder / "previous")
        if previous is None:
            pytest.skip("the history of this checkout has no previous release: git fetch --unshallow")
        copy_packages(previous, self._releases / "previous")
        write_next_release(self._releases / "next")
        for name in self._names:
            (self._releases / name).symlink_to("previous")
        super().__init__(folder)

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
def rolling(
    request: pytest.FixtureRequest, shared: Shared[Platform], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared[Rolling]]:
    shared.close()  # it scans the same addresses
    found = Shared(request.session, tmp_path_factory, Rolling)
    yield found
    found.close()


@pytest.mark.proves("F28", "G10")
def test_rolling_upgrade_and_rollback_during_scans_lose_nothing(rolling: Shared[Rolling]) -> None:
    """During a rolling upgrade and rollback scans complete, no record is dead-lettered, and no field is erased."""
    platform, invariants = rolling.lend()
    user = platform.caller()
    # One order for both: a service runs the newer release beside older ones in the upgrade, and the older one in the rollback.
    names = [name for service in SERVICES for name in platform.names(service)]
    with platform.servers() as servers:
        jobs = [user.scan(platform.network(24), **STEADY)]
        for release in ("next", "previous"):
            for name in names:
                platform.change(name, release)
                if user.status(jobs[-1]) == "completed":
                    jobs.append(user.scan(platform.network(24), **STEADY))
            jobs.append(user.scan(platform.network(24), **STEADY))  # all processes are of one release again
            until(lambda: bool(platform.nmaps()), LIMIT, "a scan to run")
        for job_id in jobs:
            assert user.finished(job_id)["status"]["status"] == "completed"
            assert {(each["ip_address"], each["port"]) for each in user.results(job_id)} == servers
    invariants.check()
    assert {topic.name: len(platform.records(topic, letters=True)) for topic in TOPICS} == {
        topic.name: 0 for topic in TOPICS
    }
    tasks = [record.value or b"" for record in platform.records(SCAN_TASKS)]
    assert any(FIELD.encode() in task and json.loads(task)["job_id"] in jobs for task in tasks)
    made = [job for command in platform.commands(state="accepted") for job in command["jobs"] if job["_id"] in jobs]
    written = {job["_id"] for job in made if FIELD in job}
    assert written
    assert {job["_id"] for job in platform.jobs() if FIELD in job and FIELD in job["totals"]} >= written
    user.close()
