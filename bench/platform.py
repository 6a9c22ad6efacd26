"""Scans through the platform beside plain nmap on the same machine, in turns."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from bench.figures import Figure
from bench.kit import new_stack
from local.demo import real_servers
from local.stack import Stack
from local.wait import until
from tests.client import FINAL, Client

SUBNET = "127.9.8.0/24"
WIDE = "127.9.0.0/16"
HALF = 50  # percent
QUICK = {"service_detection": False, "timing": 4}
ROUNDS = 5
WARM_UP = 2  # scans of a new stack, in which Kafka's JVM still compiles
JOBS = 200
CLIENTS = 8
ONE_PORT = QUICK | {"ports": "8080"}
ONE_PORT_ARGUMENTS = ("-n", "-T4", "-p", "8080")


def measure() -> Iterator[Figure]:
    with new_stack() as stack, real_servers():
        user = Client(stack.url, stack.token(7))
        yield Figure("scan_ratio", scan_ratio(user, 1_000), "a /24 × 1,000 ports / plain nmap", at_most=0.85)
        yield Figure("quick_ratio", scan_ratio(user, 100), "a /24 × 100 ports / plain nmap")
        yield Figure("readable_p95_ms", readable_p95_ms(user), "a host in the log to its result in the API")
        yield from jobs_ratios(user)
        yield Figure("killed_ratio", killed_ratio(stack, user), "a /16 with a killed worker / without", at_most=1.5)


def scan_ratio(user: Client, ports: int) -> float:
    """Return the median of the ratios of pairs, run in turn, so that a change of the machine's speed hits both."""
    subnet_id, policy_id = user.subnet(SUBNET), user.policy(**QUICK | {"ports": f"top:{ports}"})
    plain = ["nmap", "-n", "-v", "-T4", "--top-ports", str(ports), SUBNET]
    for job in [user.submit([subnet_id], policy_id)[0] for _ in range(WARM_UP)]:
        follow(user, job["id"])
    ratios = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        (job,) = user.submit([subnet_id], policy_id)
        follow(user, job["id"])
        middle = time.perf_counter()
        subprocess.run(plain, stdout=subprocess.DEVNULL, check=True)
        ratios.append((middle - begin) / (time.perf_counter() - middle))
    return statistics.median(ratios)


def follow(user: Client, job_id: int) -> None:
    """Return at the end of the job's stream: a stream costs the platform less than polling."""
    for task in user.watch(job_id):
        final = task["status"]["status"]
    if final != "completed":
        raise RuntimeError(f"job {job_id} is {final}: nothing was measured")


def readable_p95_ms(user: Client) -> float:
    """Return the 95th percentile; a result's `created_at` is the timestamp of its host by the broker, which is on this machine."""
    job_id = user.scan(SUBNET, **QUICK | {"ports": "8000-8100"})
    seen: dict[int, float] = {}
    while True:
        final = user.status(job_id) in FINAL
        results = user.results(job_id)
        now = datetime.now(UTC)
        for each in results:
            seen.setdefault(each["id"], 1_000 * (now - datetime.fromisoformat(each["created_at"])).total_seconds())
        if final:
            return statistics.quantiles(seen.values(), n=20)[-1]


def jobs_ratios(user: Client) -> Iterator[Figure]:
    """Measure one-host jobs to completed, in one POST and posted singly, beside as many nmaps, four at a time."""
    policy_id = user.policy(**ONE_PORT)
    hosts = [f"127.9.7.{number}" for number in range(1, JOBS + 1)]
    subnet_ids = [user.subnet(f"{host}/32") for host in hosts]
    command = ["xargs", "-P4", "-n1", "nmap", *ONE_PORT_ARGUMENTS]
    begin = time.perf_counter()
    subprocess.run(command, input="\n".join(hosts).encode(), stdout=subprocess.DEVNULL, check=True)
    plain = time.perf_counter() - begin

    def ended() -> float:
        until(lambda: user.unfinished() == 0, 120, "all jobs to be final")
        return time.perf_counter() - begin

    begin = time.perf_counter()
    user.submit(subnet_ids, policy_id)
    yield Figure("jobs_ratio", plain / ended(), f"{JOBS} one-host jobs in one POST / xargs -P4 nmap", at_least=3)
    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda subnet_id: user.submit([subnet_id], policy_id), subnet_ids))
    yield Figure("single_jobs_ratio", plain / ended(), f"the same posted singly by {CLIENTS} clients", at_least=1)


def killed_ratio(stack: Stack, user: Client) -> float:
    """Return the time of a /16 whose first worker is killed at half of it, divided by the time of the same job without the kill."""
    subnet_id, policy_id = user.subnet(WIDE), user.policy(**ONE_PORT)

    def seconds(*, kill: bool) -> float:
        begin = time.perf_counter()
        (job,) = user.submit([subnet_id], policy_id)
        if kill:
            until(lambda: user.task(job["id"])["status"]["progress"] >= HALF, 600, "half of the job")
            stack.kill("scanner-worker-1")
        follow(user, job["id"])
        return time.perf_counter() - begin

    pairs = [{kill: seconds(kill=kill) for kill in order} for order in ((False, True), (True, False), (False, True))]
    return statistics.median(pair[True] / pair[False] for pair in pairs)
