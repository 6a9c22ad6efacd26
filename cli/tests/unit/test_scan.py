"""`scanfleet scan`, from targets to a table."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.messages.commands import MAX_SUBNETS
from scanfleet_cli.findings import TABLE_FIELDS
from scanfleet_cli_testing.api import FakeApi
from scanfleet_cli_testing.jobs import FakeJob, result


def found(*results: dict[str, Any], machines: int = 2) -> Any:
    def made(job: FakeJob) -> None:
        job.results, job.machines = list(results), machines

    return made


SSH = result(1, "127.9.8.1", 22)
WEB = result(2, "127.9.8.7", 80, service="http", version="nginx \x1b[31m1.22")


def test_scan_prints_results_and_created_objects(api: FakeApi, run: Any) -> None:
    """Results go to stdout, one line each without a terminal, and everything else to stderr."""
    api.made = found(SSH, WEB)
    ended = run("scan", "127.9.8.0/24", "--ports", "22,80", "--preset", "quick")
    assert ended.code == 0
    assert (
        ended.out == "127.9.8.1\t22/tcp\topen\tssh\tOpenSSH 9.2p1\n127.9.8.7\t80/tcp\topen\thttp\tnginx \\x1b[31m1.22\n"
    )
    assert 'job 41 · 127.9.8.0/24 (subnet 5 "cli-' in ended.err
    assert "created) · quick, 2 ports (policy 3" in ended.err
    assert "job 41 completed 100% machines=2 accounted=true answered=256" in ended.err
    assert "2 open ports on 2 machines" in ended.err


def test_second_scan_reuses_subnet_and_policy(api: FakeApi, run: Any) -> None:
    """A subnet with the same CIDR and exclusions and a policy with the same fields are used again, others are made."""
    first = ("scan", "127.9.8.0/24", "--exclude", "127.9.8.128/25", "--ports", "80,22")
    assert run(*first).code == 0
    again = run(
        "scan", "127.9.8.0/24", "--exclude", "127.9.8.128/26", "--exclude", "127.9.8.192/26", "--ports", "22,80"
    )
    assert again.err.count("reused") == 2
    assert (len(api.subnets), len(api.policies), len(api.jobs)) == (1, 1, 2)
    assert run("scan", "127.9.8.0/24", "--ports", "22").err.count("created") == 2


def test_scan_with_a_cut_post_creates_one_job(api: FakeApi, run: Any) -> None:
    """A connection that is cut after the service took the request is repeated with the same key."""
    cut = httpx2.ReadError("connection reset")
    seen: list[str] = []

    def fault(request: httpx2.Request) -> Exception | None:
        if request.method == "POST" and request.url.path == "/api/v1/task":
            seen.append(request.headers["idempotency-key"])
            if len(seen) == 1:
                api.fault_of = lambda _request: None
                api.carry_out(request)
                return cut
        return None

    api.fault_of = fault
    assert run("scan", "127.9.8.0/24").code == 0
    assert len(api.jobs) == 1


@pytest.mark.parametrize("cuts", [1, 2])
def test_scan_with_a_cut_post_of_a_subnet_creates_one_subnet(api: FakeApi, run: Any, cuts: int) -> None:
    """A subnet whose answer was lost is looked for before it is made again."""
    left = [cuts]

    def fault(request: httpx2.Request) -> Exception | None:
        if request.method == "POST" and request.url.path == "/api/v1/subnet" and left[0]:
            left[0] -= 1
            if not left[0]:
                api.carry_out(request)
            return httpx2.ReadError("connection reset")
        return None

    api.fault_of = fault
    assert run("scan", "127.9.8.0/24").code == 0
    assert len(api.subnets) == 1


def lost(job: FakeJob) -> None:
    job.counts = {"answered": 192, "lost": 64}
    job.not_probed = [
        rest.LedgerEntry(address=f"127.9.8.{64 + n}", ports="22", outcome="lost", reason="nmap was killed three times")
        for n in range(64)
    ]
    job.error = "64 addresses were lost"


def test_failed_scan_lists_addresses_that_were_not_probed(api: FakeApi, run: Any) -> None:
    """The end of a failed job names how many addresses were not probed, why, and their networks, and exits 3."""
    api.states, api.made = [(JobStatus.RUNNING, 10), (JobStatus.FAILED, 75)], lost
    ended = run("scan", "127.9.8.0/24")
    assert ended.code == 3
    assert "64 of 256 addresses were NOT probed: nmap was killed three times (127.9.8.64/26)" in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("results", "fail_on", "code"),
    [
        ([SSH], "open", 8),
        ([SSH], "80", 0),
        ([SSH], "20-25", 8),
        ([], "open", 0),
        ([SSH | {"status": "open|filtered"}], "22", 0),
    ],
)
def test_fail_on_matches_open_ports(api: FakeApi, run: Any, results: list[Any], fail_on: str, code: int) -> None:
    """--fail-on exits 8 when a result matches."""
    api.made = found(*results)
    assert run("scan", "127.9.8.0/24", "--fail-on", fail_on).code == code


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ([], TABLE_FIELDS),
        (["-o", "name"], TABLE_FIELDS),
        (["--found"], TABLE_FIELDS),
        (["--json", "banner", "--fail-on", "80"], "id,ip_address,port,protocol,status,service,banner"),
        (["-o", "json"], None),
        (["-o", "jsonl"], None),
        (["-o", "csv"], None),
    ],
)
def test_results_of_a_scan_are_read_with_the_fields_that_are_printed(
    api: FakeApi, run: Any, arguments: list[str], fields: str | None
) -> None:
    """The output of nmap, most of a result, is read only where it is printed."""
    api.made = found(SSH)
    assert run("scan", "127.9.8.0/24", *arguments).code == 0
    reads = [each for each in api.requests if each.url.path.endswith("/results")]
    assert {each.url.params.get("fields") for each in reads} == {fields}


def test_found_of_a_watch_is_read_with_the_fields_of_a_table(api: FakeApi, run: Any) -> None:
    """The polls of a running job and the read at its end have the same fields."""
    api.states, api.made = [(JobStatus.RUNNING, 62)], found(SSH)
    run("scan", "127.9.8.0/24", "--no-watch")
    assert run("job", "watch", "41", "--found", "--timeout", "0.3s").code == 124
    api.jobs[41].states = [(JobStatus.COMPLETED, 100)]
    assert run("job", "watch", "41", "--found").code == 0
    reads = [each for each in api.requests if each.url.path.endswith("/results")]
    assert {("after" in each.url.params, each.url.params.get("fields")) for each in reads} == {
        (True, TABLE_FIELDS),
        (False, TABLE_FIELDS),
    }


def test_json_of_a_scan_is_one_document(api: FakeApi, run: Any) -> None:
    """-o json prints task, ledger and results as the API answers them."""
    api.made = found(SSH)
    document = json.loads(run("scan", "127.9.8.0/24", "-o", "json").out)
    assert document["job"] == json.loads(api.jobs[41].task.model_dump_json())
    assert document["results"] == [SSH]
    assert document["ledger"]["accounted"] is True
    assert "not_probed" not in document["ledger"]


def test_json_lines_of_a_scan_are_states_then_results(api: FakeApi, run: Any) -> None:
    """-o jsonl prints each state and each result with its `kind`."""
    api.made = found(SSH)
    lines = [json.loads(line) for line in run("scan", "127.9.8.0/24", "-o", "jsonl").out.splitlines()]
    assert [each["kind"] for each in lines] == ["task", "task", "task", "result"]
    assert [each["status"]["progress"] for each in lines[:3]] == [0, 62, 100]


def test_targets_of_a_file_are_scanned(api: FakeApi, run: Any, tmp_path: Any) -> None:
    """A file of lines, with comments, or a CSV with names and exclusions, makes a job for each target."""
    (tmp_path / "lines").write_text("127.9.8.0/30 # lab\n\n127.9.8.9\n")
    (tmp_path / "csv").write_text("cidr,name,exclude\n127.9.9.0/24,web,127.9.9.1/32 127.9.9.2/32\n")
    assert run("scan", "--targets", tmp_path / "lines", "--no-watch").out.count("pending") == 2
    assert run("scan", "--targets", tmp_path / "csv", "--no-watch").code == 0
    assert [each["cidr"] for each in api.subnets.values()] == ["127.9.8.0/30", "127.9.8.9/32", "127.9.9.0/24"]
    assert api.subnets[7]["name"] == "web"
    assert api.subnets[7]["exclude"] == ["127.9.9.1/32", "127.9.9.2/32"]


@pytest.mark.parametrize("source", ["--targets", "-"])
def test_targets_of_a_spreadsheet_may_begin_with_a_byte_order_mark(
    api: FakeApi, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """The mark is part of the encoding, not of the first column."""
    file = tmp_path / "csv"
    file.write_text("\ufeffcidr,name\n127.9.9.0/24,web\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text(encoding="utf-8")))
    assert run("scan", source, *([file] if source == "--targets" else []), "--no-watch").code == 0
    assert [(each["name"], each["cidr"]) for each in api.subnets.values()] == [("web", "127.9.9.0/24")]


def test_targets_as_csv_keep_number_signs_in_cells_and_may_have_spaces_in_the_header(
    api: FakeApi, run: Any, tmp_path: Any
) -> None:
    """Header cells are stripped, and only a line that begins with # is a comment."""
    (tmp_path / "csv").write_text("# site A\nname, cidr\nrack #3,127.9.9.0/24\n")
    assert run("scan", "--targets", tmp_path / "csv", "--no-watch").code == 0
    assert [(each["name"], each["cidr"]) for each in api.subnets.values()] == [("rack #3", "127.9.9.0/24")]


def test_wrong_usage_exits_2_and_creates_nothing(api: FakeApi, run: Any) -> None:
    """Wrong usage exits 2 before any object is created."""
    for arguments in (
        ["scan"],
        ["scan", "127.9.8.0/24", "--fail-on", "99999"],
        ["scan", "127.9.8.0/24", "--timeout", "soon"],
        ["scan", "127.9.8.0/24", "--policy", "3", "--ports", "22"],
        ["scan", "127.9.8.0/24", "--nonsense"],
        ["scan", "127.9.8.0/24", "--no-watch", "--fail-on", "open"],
        ["scan", "127.9.8.0/24", "--no-watch", "--found"],
        ["scan", "127.9.8.0/24", "--no-watch", "--timeout", "30m"],
    ):
        ended = run(*arguments)
        assert ended.code == 2, arguments
        assert ended.err.startswith("scanfleet: ")
    assert not api.subnets


def test_name_of_a_subnet_as_target_exits_2_and_creates_nothing(api: FakeApi, run: Any) -> None:
    """A target that is not a network is refused before anything is created, with the command that takes names."""
    ended = run("scan", "127.9.8.0/24", "lab")
    assert ended.code == 2
    assert (
        "target lab is not a network or an address\n  to scan a subnet by its name: scanfleet job submit" in ended.err
    )
    assert (api.subnets, api.policies, api.jobs) == ({}, {}, {})


def test_duplicate_target_exits_2_and_creates_nothing(api: FakeApi, run: Any) -> None:
    """Two targets with the same network and the same effective exclusions are one, however they are written."""
    same = ("--exclude", "127.9.8.0/26", "--exclude", "127.9.8.64/26")
    ended = run("scan", "127.9.8.0/24", "127.9.9.0/24", "127.9.8.0/24", *same)
    assert ended.code == 2
    assert "target 127.9.8.0/24 is given twice" in ended.err
    assert not api.requests


def test_more_targets_than_a_request_takes_exit_2_and_create_nothing(api: FakeApi, run: Any, tmp_path: Any) -> None:
    """A list that the service would refuse at the end is refused before the first request."""
    file = tmp_path / "targets"
    file.write_text("\n".join(f"127.9.{number // 256}.{number % 256}" for number in range(MAX_SUBNETS + 1)))
    ended = run("scan", "--targets", file, "--no-watch")
    assert ended.code == 2
    assert "1,001 targets: one command scans up to 1,000" in ended.err
    assert not api.requests


def test_subnets_are_listed_once_for_all_targets(api: FakeApi, run: Any) -> None:
    """The number of requests to list subnets does not grow with the targets."""
    assert run("scan", "127.9.8.0/24", "127.9.9.0/24", "127.9.10.0/24", "--no-watch").code == 0
    lists = [each for each in api.requests if (each.method, each.url.path) == ("GET", "/api/v1/subnet")]
    assert len(lists) == 1


def test_scan_of_many_targets_compares_each_with_the_subnets_once(api: FakeApi, run: Any, tmp_path: Any) -> None:
    """The time to find the subnets of targets grows with their sum, not with their product."""
    networks = [f"127.{9 + number // 256}.{number % 256}.0/24" for number in range(1_000)]
    run("subnet", "create", "first", networks[0])
    api.subnets = {5 + at: api.subnets[5] | {"id": 5 + at, "cidr": cidr} for at, cidr in enumerate(networks)}
    (tmp_path / "targets").write_text("\n".join(networks[:200]))  # the last ones of the list
    began = time.process_time()
    ended = run("scan", "--targets", tmp_path / "targets", "--no-watch")
    assert time.process_time() - began < 2
    assert (ended.code, ended.err.count(", reused)"), len(api.subnets)) == (0, 200, 1_000)


def test_scan_with_an_invalid_field_prints_the_message_of_the_service(run: Any) -> None:
    """A field that the service refuses is not refused by the command, and its sentence is shown as it is."""
    ended = run("scan", "127.9.8.0/24", "--ports", "22,99999")
    assert ended.code == 2
    assert "ports: " in ended.err


def test_time_limit_leaves_the_job_running(api: FakeApi, run: Any) -> None:
    """--timeout exits 124 and prints the command to return."""
    api.states = [(JobStatus.RUNNING, 62)]
    ended = run("scan", "127.9.8.0/24", "--timeout", "0.5s")
    assert ended.code == 124
    assert "job 41 still running (62 %), gave up waiting after 0.5s" in ended.err
    assert api.jobs[41].status is JobStatus.RUNNING
