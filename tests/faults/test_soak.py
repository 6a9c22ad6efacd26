"""Mixed load while processes die: `make soak MINUTES=10`, and a minute of it in `make test-long`."""

from __future__ import annotations

import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, Final
from uuid import uuid4

import httpx2
import pytest

from scanfleet.services import SERVICES
from tests.faults.invariants import Invariants
from tests.faults.kit import LIMIT_SECONDS, STEADY, TINY, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SECONDS: Final = 60 * float(os.environ.get("MINUTES", "1"))
PACE_SECONDS: Final = 10  # between two kills
GROWTH: Final = 64 * 1024  # kilobytes: maximum growth of a warm process over a new one


class User:
    """Submits, watches, reads and cancels jobs, whichever processes are unavailable."""

    def __init__(self, platform: Platform, seed: int, over: Event) -> None:
        self._callers = [platform.caller(1_000_000 + seed, gateway) for gateway in platform.names("api-gateway")]
        self._platform = platform
        self._chance = random.Random(seed)  # noqa: S311 # a mix, not a secret
        self._over = over
        self.jobs: dict[int, str] = {}

    def work(self) -> None:
        subnets = [self._made("subnet", {"name": "x", "cidr": self._platform.network(bits)}) for bits in (24, 26, 29)]
        policies = [self._made("policy", {"name": "x", **policy}) for policy in (TINY, STEADY)]
        while not self._over.is_set():
            body = {"subnet_ids": self._chance.sample(subnets, 2), "policy_id": self._chance.choice(policies)}
            answer = self._ask("POST", "/api/v1/task", json=body, headers={"Idempotency-Key": uuid4().hex})
            for job in answer["jobs"]:
                self._live(job["id"], cancel=self._chance.random() < 0.25)

    def close(self) -> None:
        for caller in self._callers:
            caller.close()

    def _live(self, job_id: int, *, cancel: bool) -> None:
        status = "pending"
        while status in {"pending", "running"}:
            if self._over.is_set():
                return
            time.sleep(0.2)  # polling interval of a user
            if cancel and status == "running":
                cancel = False
                self._ask("POST", f"/api/v1/task/{job_id}/cancel", fine={400})
            status = self._ask("GET", f"/api/v1/task/{job_id}")["status"]["status"]
        self.jobs[job_id] = status
        self._ask("GET", f"/api/v1/task/{job_id}/results")

    def _made(self, kind: str, body: dict[str, Any]) -> int:
        made: int = self._ask("POST", f"/api/v1/{kind}", json=body)["id"]
        return made

    def _ask(self, method: str, path: str, fine: frozenset[int] | set[int] = frozenset(), **request: Any) -> Any:
        """Return the first answer of any running gateway that does not ask to retry later."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            try:
                answer = self._chance.choice(self._callers).http.request(method, path, **request)
                if answer.is_success or answer.status_code in fine:
                    return answer.json()
            except httpx2.TransportError:
                continue  # its gateway has just been killed
            assert answer.status_code in {429, 503}, answer.text
            time.sleep(0.2)  # shorter than Retry-After: impatient users are the worse case
        raise TimeoutError(f"{method} {path} was never answered")


@pytest.mark.proves("F24", "G1", "G3", "G6", "G7", "G11", "G16")
def test_soak_keeps_every_guarantee(
    platform: Platform, invariants: Invariants, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under mixed load with a random process killed every ten seconds every guarantee holds, and no resource leaks."""
    invariants.check()
    chance = random.Random()  # noqa: S311 # any seed
    names = [name for service in SERVICES for name in platform.names(service)] + ["kafka", "mongod"]
    before = platform.memory()
    over = Event()
    users = [User(platform, seed, over) for seed in range(3)]
    killed: list[str] = []
    with ThreadPoolExecutor() as threads:
        working = [threads.submit(user.work) for user in users]
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not any(each.done() for each in working):
                time.sleep(PACE_SECONDS)
                killed.append(chance.choice(names))
                platform.kill(killed[-1])
        finally:
            over.set()
        for each in working:
            each.result()
    for user in users:
        user.close()
    platform.servers.wait_until_ready()
    invariants.check()
    after = platform.memory()
    jobs = [status for user in users for status in user.jobs.values()]
    report = [f"{len(jobs)} jobs: {', '.join(f'{jobs.count(end)} {end}' for end in sorted(set(jobs)))}"]
    report += [f"killed: {', '.join(killed)}"]
    report += [f"{'process':22}{'KB before':>12}{'after':>10}{'files before':>14}{'after':>8}"]
    for name in sorted(after):
        report += [f"{name:22}{before[name][0]:12}{after[name][0]:10}{before[name][1]:14}{after[name][1]:8}"]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(report) + "\n")
    assert jobs
    for name, (memory, files) in after.items():
        assert memory < before[name][0] + GROWTH, name
        assert files < before[name][1] + 32, name
