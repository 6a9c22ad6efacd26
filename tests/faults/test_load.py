"""One user who uses everything that the quotas and limits allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event
from time import monotonic as clock
from time import sleep
from typing import Final
from uuid import uuid4

import httpx2
import pytest

from local.wait import until
from scanfleet.services import SERVICES
from tests.faults.invariants import Invariants
from tests.faults.kit import LIMIT_SECONDS, STEADY, TINY, Caller, Platform, scanned

pytestmark = [pytest.mark.e2e, pytest.mark.long]

JOBS: Final = 500
STREAMS: Final = 64  # open at once, the limit of a user of one gateway
CANCEL_SECONDS: Final = 10.0  # the promise
ATTEMPT_SECONDS: Final = 120.0  # longest attempt: a free slot is shared fairly, and a used one ends by then
PROBE_SECONDS: Final = 3.0  # after which Kubernetes counts a probe as failed
LARGEST: Final = {"ports": "1-65535", "service_detection": False}
SLOWEST: Final = {"ports": "1-100", "service_detection": False, "timing": 0}


@contextmanager
def repeated(*actions: Callable[[], None]) -> Iterator[None]:
    """Repeat each action in a thread of its own for the duration of the block."""
    over = Event()

    def repeat(action: Callable[[], None]) -> None:
        while not over.is_set():
            action()

    with ThreadPoolExecutor(len(actions)) as threads:
        running = [threads.submit(repeat, action) for action in actions]
        try:
            yield
        finally:
            over.set()
        for each in running:
            each.result()


def decided(caller: Caller, body: Mapping[str, object]) -> list[int]:
    """Submit jobs and return the statuses; one that is shed with a 503 is repeated with its key when `Retry-After` says so."""
    headers = {"Idempotency-Key": uuid4().hex}
    statuses: list[int] = []

    def decide() -> bool:
        answer = caller.http.post("/api/v1/task", json=body, headers=headers)
        statuses.append(answer.status_code)
        if answer.is_server_error:
            sleep(float(answer.headers["retry-after"]))
        return statuses[-1] != httpx2.codes.SERVICE_UNAVAILABLE

    until(decide, LIMIT_SECONDS, "a submit to be accepted or refused")
    return statuses


@pytest.mark.proves("F34", "A22", "G8", "G11", "G20")
def test_user_with_the_largest_jobs_delays_others_within_bounds(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """Beside 500 jobs of 32,768 addresses and all ports, others' scans complete, cancels stop packets, and probes succeed."""
    heavy = platform.caller()
    number = int(heavy.http.get("/api/v1/me").json()["user_id"])
    lines = "\n".join(f"large {line},{platform.net}.128.0/17" for line in range(JOBS))
    headers = {"Content-Type": "text/csv"}
    imported = heavy.http.post(
        "/api/v1/subnet/import", content=f"name,cidr\n{lines}", headers=headers, timeout=LIMIT_SECONDS
    )
    large = [each["id"] for each in imported.raise_for_status().json()["subnets"]]
    policy = heavy.policy(**LARGEST)
    refused = heavy.http.post("/api/v1/task", json={"subnet_ids": large[:1], "policy_id": heavy.policy(**SLOWEST)})
    assert refused.status_code == 400  # more chunks than a job may have
    assert "limit" in refused.json()["error"]
    slow = heavy.submit([heavy.subnet(platform.network(30))], heavy.policy(**SLOWEST))[0]["id"]
    answer = heavy.http.post("/api/v1/task", json={"subnet_ids": large, "policy_id": policy}, timeout=LIMIT_SECONDS)
    jobs = [each["id"] for each in answer.raise_for_status().json()["jobs"]]
    until(lambda: bool(platform.nmaps()), LIMIT_SECONDS, "a scan to run")
    statuses: Counter[tuple[str, int]] = Counter()
    waits: list[float] = []

    def submit() -> None:
        body = {"subnet_ids": large[:1], "policy_id": policy}
        *shed, status = decided(heavy, body)
        statuses["submit", status] += 1
        statuses["shed", 503] += len(shed)

    def read() -> None:
        statuses["read", heavy.http.get(f"/api/v1/task/{jobs[0]}/ledger").status_code] += 1

    def probe() -> None:
        for name in (each for service in SERVICES for each in platform.names(service)):
            for path in ("healthz", "readyz"):
                began = clock()
                assert prober.get(f"{platform.stack.ports.probes(name)}/{path}").status_code == 200, name
                waits.append(clock() - began)

    with platform.listeners((1, 2)) as servers, httpx2.Client() as prober, ExitStack() as opened:
        streaming = [
            opened.enter_context(heavy.http.stream("GET", f"/api/v1/task/{slow}/events")) for _ in range(STREAMS + 1)
        ]
        assert Counter(stream.status_code for stream in streaming) == {200: STREAMS, 429: 1}
        with repeated(submit, submit, read, read, probe):
            _, found = scanned(user, user.scan(platform.network(29), **TINY), ATTEMPT_SECONDS)
            assert {(address, int(port)) for address, _, port, *_ in found} == servers
            mine = user.scan(platform.network(25), **STEADY)
            until(lambda: user.status(mine) == "running", ATTEMPT_SECONDS, "the other scan to run")
            for caller, job in ((user, mine), (heavy, slow), (heavy, jobs[0])):
                began = clock()
                caller.cancel(job)
                ids = {chunk["_id"] for chunk in platform.documents.chunks(job)}
                until(
                    lambda: not platform.documents.chunks(job, state={"$in": ["dispatched", "running"]}),  # noqa: B023 # called before the next turn
                    began + CANCEL_SECONDS - clock(),
                    f"the {len(ids)} chunks of the job to be stopped",
                )
    assert statuses["read", 200] > 0
    assert statuses["submit", 201] > 0
    assert statuses.pop(("shed", 503)) <= sum(count for (action, _), count in statuses.items() if action == "submit")
    assert {status for _, status in statuses} <= {200, 201, 429}
    assert max(waits) < PROBE_SECONDS
    until(
        lambda: heavy.http.post("/api/v1/task/cancel", json={"all": True}, timeout=LIMIT_SECONDS).is_success,
        LIMIT_SECONDS,
        "cancels",
    )
    until(
        lambda: not platform.documents.jobs(user_id=number, status={"$in": ["pending", "running"]}),
        LIMIT_SECONDS,
        "every job to end",
    )
    heavy.close()
    invariants.check()


@pytest.mark.proves("F34", "A22", "G8", "G11", "G20")
def test_user_whose_submits_are_refused_by_their_plans_delays_others_within_bounds(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """Beside submits of 100 subnets with 1,000 excludes, and their estimates, others' submits and cancels are carried out."""
    heavy = platform.caller()
    exclude = [f"{platform.net}.{16 + place // 128}.{place % 128 * 2}" for place in range(1_000)]
    body = {"name": "excluded", "cidr": f"{platform.net}.16.0/21", "exclude": exclude}
    created = [heavy.http.post("/api/v1/subnet", json=body) for _ in range(99)]
    assert {each.status_code for each in created} == {201}, created[0].text
    subnets = [each.json()["id"] for each in created]
    too_large = heavy.subnet(f"{platform.net}.128.0/17")
    policy = heavy.policy(**SLOWEST)
    statuses: Counter[tuple[str, int]] = Counter()

    def submit() -> None:
        asked = {"subnet_ids": [*subnets, too_large], "policy_id": policy}
        statuses["submit", heavy.http.post("/api/v1/task", json=asked).status_code] += 1

    def estimate() -> None:
        asked = {"subnet_id": subnets[0], "policy_id": policy}
        statuses["estimate", heavy.http.post("/api/v1/task/estimate", json=asked).status_code] += 1

    mine = user.scan(platform.network(30), **SLOWEST)
    until(lambda: user.status(mine) == "running", ATTEMPT_SECONDS, "the scan to run")
    small = {"subnet_ids": [user.subnet(platform.network(30))], "policy_id": user.policy(**TINY)}
    with repeated(*[submit] * 16, *[estimate] * 4):
        until(lambda: statuses["submit", 400] > 0, LIMIT_SECONDS, "a submit to be refused")
        for _ in range(5):
            assert decided(user, small)[-1] == httpx2.codes.CREATED
        began = clock()
        user.cancel(mine)
        until(
            lambda: not platform.documents.chunks(mine, state={"$in": ["dispatched", "running"]}),
            began + CANCEL_SECONDS - clock(),
            "the chunks of the job to be stopped",
        )
    assert statuses["estimate", 200] > 0
    assert {status for _, status in statuses} <= {200, 400, 429, 503}
    heavy.close()
    invariants.check()
