"""The parts of the bench, with stand-ins for what they measure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.__main__ import PARTS, main
from bench.backlog import HEARTBEATS, heartbeat
from bench.capacity import made
from bench.figures import Figure
from bench.fleet import assignments
from bench.kit import Load
from scanfleet.contracts.messages import ChunkProgressed, HostScanned, ScanChunk
from scanfleet.scanning.outcomes import MAX_ADDRESSES
from scanfleet.security.chunk_grants import Grants, Signer


def good() -> Iterator[Figure]:
    yield Figure("good", 1.0, "a part that ends")


def bad() -> Iterator[Figure]:
    yield Figure("early", 2.0, "measured before the failure")
    raise TimeoutError("no answer")


def test_failed_part_keeps_all_other_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """When a part fails the figures that were measured are printed, and the exit status names the part."""
    with pytest.raises(SystemExit, match=r"^failed: bad$"):
        main([], {"bad": bad, "good": good})
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == {"early": 2.0, "good": 1.0}
    assert "TimeoutError: no answer" in printed.err


def test_parts_are_those_of_the_operations_page() -> None:
    """The page from which operators size a platform names every part."""
    page = (Path(__file__).parents[3] / "docs/operations.md").read_text(encoding="utf-8")
    table = page.partition("| part | measures |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(PARTS)


def test_load_report_of_wrk_is_read() -> None:
    """Rate and percentiles are read from a report of wrk, whatever unit each has."""
    report = """\
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   170.50ms   20.10ms 321.44ms   75.00%
    Req/Sec   371.22     61.90   515.00     70.00%
  Latency Distribution
     50%  870.00us
     75%  180.32ms
     90%  192.01ms
     99%    1.25s
  3719 requests in 10.06s, 2.12MB read
Requests/sec:    369.55
Transfer/sec:    215.79KB
"""
    assert Load.of(report) == pytest.approx((369.55, 0.87, 1_250.0))


def test_capacity_hosts_fit_into_chunks() -> None:
    """A job of more hosts than a chunk may have is cut into chunks, each with a valid grant."""
    count = 2 * MAX_ADDRESSES + 1
    key = Ed25519PrivateKey.generate()
    hosts = [HostScanned.model_validate_json(host.model_dump_json()) for host in made(1, count, Signer(key))]
    grants = Grants([key.public_key()])
    assert {grants.fault(host) for host in hosts} == {""}
    assert len({host.address for host in hosts}) == count
    assert {host.chunk_id for host in hosts} == {"1-0", "1-1", "1-2"}


def test_fleet_tasks_are_valid_and_for_each_worker_in_turn() -> None:
    """The simulated assignments are records that a worker could read, and each has a grant as those of the orchestrator."""
    made_ = assignments(3, 6, Signer(Ed25519PrivateKey.generate()))
    read = [ScanChunk.model_validate_json(task.model_dump_json()) for task in made_]
    assert [task.worker_id for task in read] == [f"bench-{number}" for number in (0, 1, 2, 0, 1, 2)]
    assert len({task.grant.signature for task in read if task.grant}) == 6


def test_backlog_heartbeats_report_further_addresses() -> None:
    """Each heartbeat of a chunk is a record that the orchestrator could read, with one more address that is down."""
    (task,) = assignments(1, 1, Signer(Ed25519PrivateKey.generate()))
    read = [ChunkProgressed.model_validate_json(heartbeat(task, done).model_dump_json()) for done in range(HEARTBEATS)]
    assert {each.token for each in read} == {task.token}
    assert {len(each.outcomes) for each in read} == {len(task.outcomes)}
    assert [each.outcomes.count("d") for each in read] == list(range(HEARTBEATS))
