"""A platform that starts before what it depends on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx2
import pytest

from local.wait import until
from scanfleet.services import SERVICES, WITH_DATABASE
from tests.faults.invariants import Invariants
from tests.faults.kit import LIMIT_SECONDS, TINY, Caller, Platform

pytestmark = pytest.mark.e2e

MISSING_SECONDS: Final = 75.0  # far longer than any client retries by itself


@pytest.mark.long
@pytest.mark.proves("F33", "F6")
def test_services_without_kafka_and_mongodb_at_start_wait_and_become_ready(
    platform: Platform, user: Caller, invariants: Invariants
) -> None:
    """Processes that start without both servers stay alive and unready, and become ready by themselves."""
    subnet, policy = user.subnet(platform.network(30)), user.policy(**TINY)
    names = [name for service in SERVICES for name in platform.names(service)]
    platform.servers.stop("kafka")
    platform.servers.stop("mongod")
    try:
        before = {name: platform.pid(name) for name in names}
        for name in names:
            platform.kill(name)
        for name in names:
            until(lambda: platform.running(name) not in (0, before[name]), LIMIT_SECONDS, f"{name} to start again")  # noqa: B023 # called before the next turn
        pids = {name: platform.pid(name) for name in names}
        for name in names:
            until(lambda: answer(platform, name, "healthz") == (200, ""), LIMIT_SECONDS, f"{name} to serve")  # noqa: B023 # the same
        platform.wait(MISSING_SECONDS)
        for service in SERVICES:
            for name in platform.names(service):
                missing = "mongodb" if service in WITH_DATABASE else "kafka"
                assert answer(platform, name, "readyz") == (503, f"starting, waiting for {missing}")
                assert answer(platform, name, "healthz") == (200, "")
        refused = user.http.post("/api/v1/task", json={"subnet_ids": [subnet], "policy_id": policy})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    finally:
        platform.servers.start("mongod", "kafka")
    platform.stack.wait_until_ready()
    assert {name: platform.pid(name) for name in names} == pids
    (job,) = user.submit([subnet], policy, None)
    assert user.finished(job["id"])["status"]["status"] == "completed"
    invariants.check()


@pytest.mark.long
@pytest.mark.proves("F33")
@pytest.mark.parametrize("server", ["kafka", "mongod"])
def test_services_without_one_server_at_start_wait_for_it(
    platform: Platform, user: Caller, invariants: Invariants, server: str
) -> None:
    """Processes that start without Kafka or without MongoDB name it until it is available, and then become ready."""
    subnet, policy = user.subnet(platform.network(30)), user.policy(**TINY)
    names = [platform.names(service)[0] for service in (SERVICES if server == "kafka" else WITH_DATABASE)]
    reason = f"starting, waiting for {'kafka' if server == 'kafka' else 'mongodb'}"
    platform.servers.stop(server)
    try:
        before = {name: platform.pid(name) for name in names}
        for name in names:
            platform.kill(name)
        for name in names:
            until(lambda: answer(platform, name, "readyz") == (503, reason), LIMIT_SECONDS, f"{name} to wait", 0.2)  # noqa: B023 # called before the next turn
            assert answer(platform, name, "healthz") == (200, "")
        pids = {name: platform.pid(name) for name in names}
    finally:
        platform.servers.start(server)
    platform.stack.wait_until_ready()
    assert {name: platform.pid(name) for name in names} == pids != before
    (job,) = user.submit([subnet], policy, None)
    assert user.finished(job["id"])["status"]["status"] == "completed"
    invariants.check()


@pytest.mark.long
def test_gateway_that_has_just_become_ready_accepts_a_job(platform: Platform, invariants: Invariants) -> None:
    """The first request after a new gateway's /readyz succeeds is accepted, for each of six gateways."""
    user = platform.caller(8)
    subnet, policy = user.subnet(platform.network(32)), user.policy(**TINY)
    user.close()

    def accepts(gateway: str) -> None:
        gone = platform.pid(gateway)
        platform.kill(gateway)
        until(lambda: platform.running(gateway) not in (0, gone), LIMIT_SECONDS, f"{gateway} to start again")
        caller = platform.caller(8, gateway)
        until(lambda: platform.ready(gateway), LIMIT_SECONDS, f"{gateway} to be ready", 0.1)
        caller.submit([subnet], policy)
        caller.close()

    with ThreadPoolExecutor() as threads:
        for _ in range(3):
            list(threads.map(accepts, platform.names("api-gateway")))
    invariants.check()


def answer(platform: Platform, name: str, probe: str) -> tuple[int, str]:
    """Return status and error of a probe; (0, "") while the process does not listen."""
    try:
        found = httpx2.get(f"{platform.stack.ports.probes(name)}/{probe}", timeout=LIMIT_SECONDS)
    except httpx2.HTTPError:
        return 0, ""
    return found.status_code, found.json().get("error", "")
