"""The platform beside plain nmap on the same machine, as ratios within one run.

Prints one line of JSON:
  scan_ratio      a /24 through the platform / plain nmap with the same arguments (wall time, lower is better): nmap's own
                  thousand ports, as in the standard policy
  quick_ratio     the same with a hundred ports, where plain nmap takes less than a second
  post_p50_ms     POST of one job to its 201 on an idle stack
  readable_p95_ms host in the log to its result readable through the API
  jobs_ratio      one-host jobs a second / the rate of `xargs -P4 nmap` (higher is better)
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from datetime import UTC, datetime

from local.client import FINAL, Client
from local.demo import real_servers
from local.paths import STATE
from local.stack import USUAL_PORTS, Stack
from local.wait import until

SUBNET = "127.9.8.0/24"
QUICK = {"service_detection": False, "timing": 4}
ROUNDS = 5
POSTS = 50
JOBS = 200
ONE_PORT = QUICK | {"ports": "8080"}
ONE_PORT_ARGUMENTS = ("-n", "-T4", "-p", "8080")


def main() -> None:
    stack = Stack(STATE, usual_ports=USUAL_PORTS)
    started = stack.up()
    try:
        with real_servers():
            user = Client(stack.url, stack.token(7))
            figures = {
                "scan_ratio": scan_ratio(user, 1_000),
                "quick_ratio": scan_ratio(user, 100),
                "post_p50_ms": post_p50_ms(user),
                "readable_p95_ms": readable_p95_ms(user),
                "jobs_ratio": jobs_ratio(user),
            }
    finally:
        if started:
            stack.down()
    print(json.dumps({name: round(figure, 2) for name, figure in figures.items()}))


def scan_ratio(user: Client, ports: int) -> float:
    """Median of the ratios of pairs, run in turn, so that a change of the machine's speed hits both."""
    subnet_id, policy_id = user.subnet(SUBNET), user.policy(**QUICK | {"ports": f"top:{ports}"})
    plain = ["nmap", "-n", "-v", "-T4", "--top-ports", str(ports), SUBNET]
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
    """Return at the end of the job's stream: it costs the platform less than to be asked again and again."""
    for task in user.watch(job_id):
        final = task["status"]["status"]
    if final != "completed":
        raise RuntimeError(f"job {job_id} is {final}: nothing was measured")


def post_p50_ms(user: Client) -> float:
    """Each job is awaited before the next is posted: the stack is idle."""
    subnet_id, policy_id = user.subnet("127.9.8.1/32"), user.policy(**ONE_PORT)
    times = []
    for _ in range(POSTS):
        begin = time.perf_counter()
        (job,) = user.submit([subnet_id], policy_id)
        times.append(1_000 * (time.perf_counter() - begin))
        user.finished(job["id"])
    return statistics.median(times)


def readable_p95_ms(user: Client) -> float:
    """A result's `created_at` is the broker's stamp on the host in the log; the broker is on this machine."""
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


def jobs_ratio(user: Client) -> float:
    policy_id = user.policy(**ONE_PORT)
    hosts = [f"127.9.7.{number}" for number in range(1, JOBS + 1)]
    subnet_ids = [user.subnet(f"{host}/32") for host in hosts]
    begin = time.perf_counter()
    user.submit(subnet_ids, policy_id)
    until(lambda: user.unfinished() == 0, 120, "all jobs to be final")
    middle = time.perf_counter()
    command = ["xargs", "-P4", "-n1", "nmap", *ONE_PORT_ARGUMENTS]
    subprocess.run(command, input="\n".join(hosts).encode(), stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - middle) / (middle - begin)


if __name__ == "__main__":
    main()
