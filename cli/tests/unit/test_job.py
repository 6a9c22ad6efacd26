"""`scanfleet job`: lists, blocks, ledgers, results."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet.scanning.policy import Preset, fill_in
from scanfleet_cli.output import fields_of, paths_of
from scanfleet_cli.session import Effects
from scanfleet_cli_testing.api import TOKEN, FakeApi
from scanfleet_cli_testing.jobs import NOW, FakeJob, host_found, result


@pytest.fixture
def jobs(api: FakeApi, run: Any) -> FakeApi:
    """Job 41 completed with two results, job 42 runs."""
    run("scan", "127.9.8.0/24", "--no-watch")
    api.jobs[41].seq = 3
    api.jobs[41].results = [
        result(1, "127.9.8.1", 22),
        result(2, "127.9.8.1", 80, service="http", status="open|filtered"),
    ]
    run("scan", "127.9.8.0/24", "--no-watch")
    api.jobs[42].seq = 2
    api.requests.clear()
    return api


@pytest.mark.usefixtures("jobs")
def test_list_is_a_table_on_a_terminal(run: Any) -> None:
    """A terminal gets a header and aligned columns, and an unfinished job its progress as words."""
    lines = run("--color", "never", "job", "list", width=80).out.splitlines()
    assert lines[0].split() == ["ID", "STATUS", "SUBNET", "POLICY", "STARTED", "TOOK"]
    assert lines[1].startswith("42  running 62 %  5       3")
    assert lines[2].startswith("41  completed     5       3")
    assert lines[2].endswith("1:07")
    assert all(len(line) <= 80 for line in lines)


def test_wide_list_has_the_machines_and_the_error_of_a_failed_job(jobs: FakeApi, run: Any) -> None:
    """A table reads only unfinished jobs for their progress; with -o wide each is read."""
    jobs.jobs[42].states = [(JobStatus.FAILED, 75)]
    jobs.jobs[42].error, jobs.jobs[42].machines = "64 addresses lost", 23
    lines = run("--color", "never", "job", "list", width=80).out.splitlines()
    assert lines[1].split()[:2] == ["42", "failed"]
    assert [each.url.path for each in jobs.requests] == ["/api/v1/task"]
    lines = run("--color", "never", "job", "list", "-o", "wide", width=160).out.splitlines()
    assert lines[1].split()[-4:] == ["23", "64", "addresses", "lost"]


@pytest.mark.usefixtures("jobs")
def test_states_are_coloured_on_a_terminal_alone(run: Any) -> None:
    """A state is a word first, and has a colour only on a terminal, or when that is asked for."""
    assert "\x1b[33mrunning 62 %\x1b[0m" in run("job", "list", width=80).out
    assert "\x1b" not in run("job", "list").out
    url = {"SCANFLEET_URL": "http://scanfleet.test", "SCANFLEET_TOKEN": TOKEN}
    assert "\x1b" not in run("job", "list", width=80, environment=url | {"NO_COLOR": "1"}).out


@pytest.mark.usefixtures("jobs")
def test_list_is_tab_separated_elsewhere(run: Any) -> None:
    """Without a terminal there is no header, and times have the format of the API."""
    (line,) = run("job", "list", "--status", "completed").out.splitlines()
    assert line.split("\t") == ["41", "completed", "5", "3", "2026-03-14T09:00:00Z", "1:07"]


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(
    ("format_", "printed"),
    [
        ("name", "42\n41\n"),
        ("csv", "id,user_id,policy_id,subnet_id,status,start_time,end_time,created_at,updated_at\r\n"),
    ],
)
def test_formats_of_a_list(run: Any, format_: str, printed: str) -> None:
    """-o name prints ids, -o csv a line of names first."""
    assert run("job", "list", "-o", format_).out.startswith(printed)


@pytest.mark.parametrize(
    ("command", "header"),
    [
        ("job list --status failed", "id,user_id,policy_id,subnet_id,status,start_time,end_time,created_at,updated_at"),
        ("job results 41 --port 9", ",".join(rest.Result.model_fields)),
        ("job results 41 --port 9 --json port,service", "port,service"),
        ("job ledger 41 --networks", "network,outcome,reason"),
        ("job ledger 41 --not-probed", "address,ports,outcome,reason"),
    ],
)
@pytest.mark.usefixtures("jobs")
def test_csv_without_rows_has_a_header(run: Any, command: str, header: str) -> None:
    """The columns are those of the objects, or of --json, as with rows."""
    assert run(*command.split(), "-o", "csv").out == f"{header}\r\n"


def test_csv_of_nested_objects_is_json_in_a_cell(jobs: FakeApi, run: Any) -> None:
    """A cell with a list of objects can be parsed."""
    ports = [{"port": 22, "protocol": "tcp", "service": "ssh"}, {"port": 80, "protocol": "tcp", "service": None}]
    jobs.jobs[41].hosts = [{"ip_address": "127.9.8.1", "ports": ports, "hostnames": ["a", "b"], "scripts": []}]
    (row,) = csv.DictReader(io.StringIO(run("job", "hosts", "41", "-o", "csv").out))
    assert json.loads(row["ports"]) == ports
    assert (row["hostnames"], row["scripts"]) == ("a,b", "")


def test_list_as_json_has_the_objects_of_the_api(jobs: FakeApi, run: Any) -> None:
    """-o json is one array of the API's objects, -o jsonl one a line, --json a choice of fields."""
    wanted = [jobs.jobs[number].job.model_dump(mode="json") for number in (42, 41)]
    assert json.loads(run("job", "list", "-o", "json").out) == wanted
    assert [json.loads(line) for line in run("job", "list", "-o", "jsonl").out.splitlines()] == wanted
    assert json.loads(run("job", "list", "--json", "id,status").out) == [
        {"id": 42, "status": "running"},
        {"id": 41, "status": "completed"},
    ]


@pytest.mark.parametrize("fields", [["--json", "job_id,nonsense"], ["--json"]])
@pytest.mark.parametrize(
    "command",
    [["job", "show", "41"], ["job", "ledger", "41"], ["subnet", "list"], ["scan", "127.9.8.0/24"], ["whoami"]],
)
def test_unknown_or_missing_fields_are_listed_before_any_request(
    api: FakeApi, run: Any, command: list[str], fields: list[str]
) -> None:
    """--json without a field that exists exits 2 and lists the fields, also where there is nothing to print."""
    ended = run(*command, *fields)
    assert (ended.code, ended.out) == (2, "")
    listed = {
        "show": "job_id, status, status.status, status.progress",
        "ledger": "job_id, status, accounted, request, request.addresses",
        "list": "id, user_id, name, cidr",
        "127.9.8.0/24": "id, job_id, ip_address",
        "whoami": "url, url_source",
    }[(command * 2)[1]]
    assert f"fields: {listed}" in ended.err
    assert not api.requests


def test_fields_of_a_kind_are_those_of_its_objects(jobs: FakeApi, run: Any) -> None:
    """The list of fields, made from the models, has every path of the objects that the service returns."""
    job = jobs.jobs[41]
    host = host_found("127.9.8.1", 22)
    for kind, found in (
        (rest.TaskStatus, job.task.model_dump(mode="json")),
        (rest.Ledger, job.ledger().model_dump(mode="json")),
        (rest.Result, job.results[0]),
        (rest.Host, host),
        (rest.Subnet, jobs.subnets[5]),
        (rest.Policy, jobs.policies[3]),
    ):
        assert fields_of(kind) == list(paths_of(found))
    assert run("job", "ledger", "41", "--not-probed", "--json", "address,reason").code == 0
    assert run("job", "ledger", "41", "--networks", "--json", "address").code == 2


def test_field_that_an_older_service_omits_is_null(jobs: FakeApi, run: Any) -> None:
    """A field of this release that the response lacks is null, not an error."""
    del jobs.jobs[41].results[0]["banner"]
    (first, *_) = json.loads(run("job", "results", "41", "--json", "port,banner").out)
    assert first == {"port": 22, "banner": None}


@pytest.mark.usefixtures("jobs")
def test_list_with_a_limit_notes_the_total(run: Any) -> None:
    """--limit reads further pages and notes the total; 0 is all."""
    ended = run("job", "list", "--limit", "1", "-o", "name")
    assert (ended.out, ended.err) == ("42\n", "1 of 2; --limit 0 for all\n")
    assert run("job", "list", "--limit", "0", "-o", "name").err == ""


@pytest.fixture
def ends(jobs: FakeApi) -> FakeApi:
    """The second stream of the command is interrupted by Ctrl-C."""
    opened = [0]

    def fault(request: httpx2.Request) -> BaseException | None:
        opened[0] += request.url.path == "/api/v1/events"
        return KeyboardInterrupt() if opened[0] == 2 else None

    jobs.fault_of = fault
    return jobs


@pytest.mark.usefixtures("ends")
def test_watched_list_is_followed_by_its_changes(run: Any) -> None:
    """Without a terminal the list is printed, then a line for each state of each job."""
    ended = run("job", "list", "--watch")
    assert ended.code == 130
    states = [line.split("\t")[:2] for line in ended.out.splitlines()]
    assert states == [["42", "running 62 %"], ["41", "completed"], ["42", "running 62 %"], ["42", "completed"]]
    assert "connection lost" in ended.err


@pytest.mark.usefixtures("ends")
def test_watched_list_on_a_terminal_stays_in_its_last_state(run: Any) -> None:
    """The table is redrawn in place, and what Ctrl-C leaves is its last state."""
    ended = run("--color", "never", "job", "list", "--watch", width=80)
    last = ended.out.rpartition("ID  STATUS")[2].splitlines()
    assert [line.split()[:2] for line in last[1:]] == [["42", "completed"], ["41", "completed"]]


@pytest.mark.parametrize("width", [0, 80])
def test_watched_list_shows_the_end_of_a_job_that_ends_before_the_stream_opens(
    jobs: FakeApi, run: Any, width: int
) -> None:
    """The list is read when the stream is first open, whose first events do not contain the job that has ended."""
    opened = [0]

    def fault(request: httpx2.Request) -> BaseException | None:
        if request.url.path == "/api/v1/events":
            opened[0] += 1
            jobs.jobs[42].seq = 3
        return KeyboardInterrupt() if opened[0] == 3 else None

    jobs.fault_of = fault
    ended = run("--color", "never", "job", "list", "--watch", width=width)
    assert [line.split()[:2] for line in ended.out.splitlines()[-2:]] == [["42", "completed"], ["41", "completed"]]
    lists = [each for each in jobs.requests if (each.method, each.url.path) == ("GET", "/api/v1/task")]
    assert len(lists) == 1


def test_watched_list_with_more_unfinished_jobs_than_the_limit_keeps_its_rows(ends: FakeApi, run: Any) -> None:
    """An unfinished job that the list does not show stays out, and a job that ends comes in."""
    for _ in range(3):
        run("scan", "127.9.8.0/24", "--no-watch")
    for number, end in ((42, JobStatus.COMPLETED), (43, JobStatus.RUNNING)):
        ends.jobs[number].states = [(JobStatus.RUNNING, 10)] * 4 + [(end, 100)]
        ends.jobs[number].seq = 1
    ended = run("--color", "never", "job", "list", "--watch", "--limit", "2", width=80)
    last = ended.out.rpartition("ID  STATUS")[2].splitlines()
    assert [line.split()[:2] for line in last[1:]] == [["42", "completed"], ["45", "completed"]]


def test_watched_list_since_a_time_has_no_older_jobs(ends: FakeApi, run: Any) -> None:
    """--since holds for the stream too."""
    assert run("job", "list", "--watch", "--since", "2026-03-14T09:00:01Z", "-o", "jsonl").out == ""
    assert ends.jobs[42].status is JobStatus.COMPLETED


@pytest.mark.parametrize("since", ["yesterday", "2026-03-14T09:00:00"])
def test_watched_list_since_an_invalid_time_is_refused(jobs: FakeApi, run: Any, since: str) -> None:
    """A text that is not a time, and a time without a zone, exit 2 before any request."""
    ended = run("job", "list", "--watch", "--since", since)
    assert ended.code == 2
    assert f"--since: {since} is not a time with a time zone" in ended.err
    assert not jobs.requests


def test_watched_list_has_the_jobs_that_match(ends: FakeApi, run: Any) -> None:
    """The filters of the list hold for the stream too, in every format of lines."""
    lines = run("job", "list", "--watch", "--status", "completed", "-o", "jsonl").out.splitlines()
    assert [(json.loads(line)["job_id"], json.loads(line)["status"]["status"]) for line in lines] == [
        ("42", "completed")
    ]
    assert ends.jobs[42].status is JobStatus.COMPLETED


@pytest.mark.usefixtures("jobs")
def test_watched_list_in_a_format_of_whole_documents_is_refused(run: Any) -> None:
    """An array would never end."""
    ended = run("job", "list", "--watch", "-o", "json")
    assert ended.code == 2
    assert "--watch" in ended.err


def test_unknown_status_lists_the_five(run: Any) -> None:
    """A status that does not exist is refused with the five that do."""
    ended = run("job", "list", "--status", "done")
    assert ended.code == 2
    assert "pending, running, completed, failed, cancelled" in ended.err


@pytest.mark.usefixtures("jobs")
def test_job_is_shown_as_a_block(run: Any) -> None:
    """The block of a job has its status, request and outcome."""
    shown = run("job", "show", "41").out
    assert shown.startswith("job 41  completed 100 %\n")
    assert "  subnet     5\n" in shown
    assert "  addresses  answered 256\n" in shown
    assert "all 256 probes of 256 addresses accounted for" in shown


def test_job_show_with_a_snapshot_prints_the_request_as_submitted(jobs: FakeApi, run: Any) -> None:
    """If the service has snapshots, a job's block shows its network and ports as they were when it was created."""
    policy = fill_in(Preset.QUICK, {}).model_dump(mode="json")
    asked = {"job_id": 41, "cidr": "127.9.8.0/24", "exclude": [], "policy": policy, "addresses": 256, "excluded": 128}
    jobs.answers["GET", "/api/v1/task/41/snapshot"] = asked | {"ports": 100, "chunks": 1, "estimate_seconds": 4.5}
    shown = run("job", "show", "41").out
    assert "  network    127.9.8.0/24 (256 addresses, 128 excluded; subnet 5)\n" in shown
    assert "  policy     quick, ports top:100 (100 ports; policy 3)\n" in shown


def test_snapshot_of_an_older_service_exits_1_with_the_reason(jobs: FakeApi, run: Any) -> None:
    """An operation that the service lacks is reported as that."""
    assert jobs
    ended = run("job", "snapshot", "41")
    assert ended.code == 1
    assert "this service does not support snapshots of jobs: it is older than this command" in ended.err


@pytest.mark.parametrize(
    ("arguments", "ports"),
    [
        ([], [22, 80]),
        (["--port", "80"], [80]),
        (["--service", "ssh"], [22]),
        (["--open-only"], [22]),
        (["--address", "127.9.9.0/24"], []),
    ],
)
def test_results_are_filtered(jobs: FakeApi, run: Any, arguments: list[str], ports: list[int]) -> None:
    """Results can be chosen by port, service, address and state."""
    ended = run("job", "results", "41", "-o", "json", *arguments)
    assert [each["port"] for each in json.loads(ended.out)] == ports
    (request,) = [each for each in jobs.requests if each.url.path.endswith("/results")]
    asked = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert {f"--{name}": value for name, value in request.url.params.items()} == asked


def test_results_in_the_service_format_are_printed_unchanged(jobs: FakeApi, run: Any) -> None:
    """CSV and JSON lines are asked for as such and printed byte for byte."""
    assert run("job", "results", "41", "-o", "csv").out == "ip_address,port\r\n127.9.8.1,22\r\n127.9.8.1,80\r\n"
    assert [each.headers["accept"] for each in jobs.requests if each.url.path.endswith("/results")] == ["text/csv"]
    lines = [json.dumps(each) + "\n" for each in jobs.jobs[41].results]
    assert run("job", "results", "41", "-o", "jsonl").out == "".join([*lines, " "])


def test_results_with_raw_print_the_xml_of_nmap(jobs: FakeApi, run: Any) -> None:
    """--raw prints the XML of each port with controls escaped; a table is read without it."""
    jobs.jobs[41].results[0]["raw_data"] = '<port portid="22">\n<x \x1b/>\n</port>'
    ended = run("job", "results", "41", "--raw", "--port", "22")
    assert ended.out == '<port portid="22">\n<x \\x1b/>\n</port>\n'
    assert run("job", "results", "41", "--raw", "-o", "csv").code == 2
    jobs.requests.clear()
    assert run("job", "results", "41").code == 0
    assert "raw_data" not in jobs.requests[0].url.params["fields"]
    assert run("job", "results", "41", "--json", "port").code == 0
    assert jobs.requests[-2].url.params["fields"] == "id,ip_address,port,protocol,status,service"


def test_results_in_a_table_escape_a_hostile_banner(jobs: FakeApi, run: Any) -> None:
    """Control and bidirectional characters of a service are printed as escapes."""
    jobs.jobs[41].results[0]["service"] = "ssh\x1b[2J\u202e"
    out = run("job", "results", "41").out
    assert "ssh\\x1b[2J\\u202e" in out
    assert not {"\x1b", "\u202e"} & set(out)


def test_wide_results_on_a_terminal_are_grouped_by_address(jobs: FakeApi, run: Any) -> None:
    """Addresses are in numeric order, and each is in its first row only."""
    jobs.jobs[41].results = [
        result(n, f"127.9.8.{host}", port) for n, (host, port) in enumerate([(10, 22), (9, 80), (10, 21)], 1)
    ]
    lines = run("job", "results", "41", "-o", "wide", width=120).out.splitlines()
    assert [line[:19].split() for line in lines[1:]] == [["127.9.8.9", "80/tcp"], ["127.9.8.10", "21/tcp"], ["22/tcp"]]


@pytest.mark.parametrize("arguments", [[], ["-o", "jsonl"], ["--json", "id"], ["--address", "127.9.8.0/30"]])
def test_followed_results_are_printed_once(jobs: FakeApi, run: Any, arguments: list[str]) -> None:
    """Results of a running job are printed as they come, each once, up to its end; also one with a lower id than another."""
    job = jobs.jobs[42]
    job.states = [(JobStatus.RUNNING, 62)]
    asked: list[str] = []
    polls: list[dict[str, str]] = []

    def grows(request: httpx2.Request) -> None:
        if not request.url.path.endswith("/results"):
            return
        asked.append(request.url.params.get("after", "none"))
        polls.append({name: value for name, value in request.url.params.items() if name != "after"})
        match len(asked):
            case 1:
                job.results = [result(3, "127.9.8.1", 22), result(5, "127.9.8.2", 22)]
            case 2:
                job.results.append(result(7, "127.9.8.3", 22))
            case 3:
                job.results.append(result(6, "127.9.8.4", 22))
                job.states.append((JobStatus.COMPLETED, 100))
                job.seq = 2

    jobs.fault_of = grows
    ended = run("job", "results", "42", "--follow", *arguments)
    assert ended.code == 0, ended.err
    printed = ended.out.splitlines()
    assert len(printed) == len(set(printed)) == (3 if arguments[:1] == ["--address"] else 4)
    assert asked[:3] == ["0", "5", "7"]
    assert asked[-1] == "none"
    assert all(each == polls[-1] for each in polls)
    assert ("fields" in polls[-1]) == (arguments != ["-o", "jsonl"])
    assert ("address" in polls[-1]) == (arguments[:1] == ["--address"])


@pytest.mark.parametrize("arguments", [["--timeout", "5"], ["--follow", "--limit", "5"], ["--follow", "-o", "csv"]])
def test_options_that_exclude_each_other_are_refused(jobs: FakeApi, run: Any, arguments: list[str]) -> None:
    """A time limit needs --follow, which has no limit of rows and prints line by line."""
    assert run("job", "results", "42", *arguments).code == 2
    assert not jobs.requests


def test_results_as_xml_pass_through(jobs: FakeApi, run: Any) -> None:
    """nmap's XML is printed as the service writes it; a filter, or the format for another command, is wrong usage."""
    assert run("job", "results", "41", "-o", "xml").out == "<nmaprun></nmaprun>"
    for arguments in (["--port", "22"], ["--limit", "1"], ["--json", "port"]):
        asked = len(jobs.requests)
        ended = run("job", "results", "41", "-o", "xml", *arguments)
        assert (ended.code, ended.out, len(jobs.requests)) == (2, "", asked)
    assert run("job", "hosts", "41", "-o", "xml").code == 2


def test_hosts_are_one_line_each(jobs: FakeApi, run: Any) -> None:
    """Each host is a line with its ports and services, of which those that are open or filtered have a question mark."""
    ssh = {"port": 22, "protocol": "tcp", "status": "open", "service": "ssh", "version": ""}
    jobs.jobs[41].hosts = [
        host_found("127.9.8.1", ports=[ssh, ssh | {"port": 80, "service": "http"}], port_count=2),
        host_found("127.9.8.2", open_filtered="53,67-69", os_info="Linux 5\x1b", mac="52:54:00:12:34:56"),
        host_found("127.9.8.3", scripts=[{"id": "smb-os-discovery", "output": "x"}], hostnames=["a", "b"]),
    ]
    assert run("job", "hosts", "41").out.splitlines() == [
        "127.9.8.1\t22,80/tcp\tssh http",
        "127.9.8.2\t53,67-69/udp?\t-",
        "127.9.8.3\t-\t-",
    ]
    wide = run("job", "hosts", "41", "-o", "wide").out.splitlines()
    assert wide[1] == "127.9.8.2\t53,67-69/udp?\t-\tanswered\tLinux 5\\x1b\t52:54:00:12:34:56\t-\t-"
    assert wide[2].endswith("\ta,b\tsmb-os-discovery")
    assert json.loads(run("job", "hosts", "41", "-o", "json").out) == jobs.jobs[41].hosts
    assert run("job", "hosts", "41", "-o", "name").out == "127.9.8.1\n127.9.8.2\n127.9.8.3\n"


def test_hosts_are_filtered_by_the_service(jobs: FakeApi, run: Any) -> None:
    """The filters of hosts are those of the request."""
    ended = run("job", "hosts", "41", "--port", "22", "--port", "80", "--service", "ssh", "--address", "127.9.8.0/24")
    asked = jobs.requests[-2].url.params
    assert (asked.get_list("port"), asked["service"], asked["address"]) == (["22", "80"], "ssh", "127.9.8.0/24")
    assert "no host matches" in ended.err


def test_hosts_of_an_older_service_exit_1_with_the_reason(jobs: FakeApi, run: Any) -> None:
    """A service without lists of hosts is reported as that."""
    jobs.answers["GET", "/api/v1/task/41/hosts"] = httpx2.Response(404, json={"error": "Not Found"})
    ended = run("job", "hosts", "41")
    assert ended.code == 1
    assert "this service does not support lists of hosts: it is older than this command" in ended.err


@pytest.mark.parametrize("command", ["results", "hosts"])
def test_limit_that_is_given_holds_without_a_terminal(jobs: FakeApi, run: Any, command: str) -> None:
    """A pipe receives everything unless --limit is given, and then stderr notes the total."""
    jobs.jobs[41].results = [result(number, f"127.9.8.{number}", 22) for number in range(1, 41)]
    jobs.jobs[41].hosts = [host_found(f"127.9.8.{number}", 22) for number in range(1, 41)]
    assert len(run("job", command, "41").out.splitlines()) == 40
    for format_ in ([], ["-o", "jsonl"]):
        ended = run("job", command, "41", "--limit", "2", *format_)
        assert len(ended.out.splitlines()) == 2
        assert "2 of 40; --limit 0 for all" in ended.err


def partly(job: FakeJob) -> None:
    job.states, job.seq = [(JobStatus.CANCELLED, 50)], 1
    job.counts = {"answered": 252, "timed_out": 1, "cancelled": 2, "lost": 1}
    job.not_probed = [
        rest.LedgerEntry(address="127.9.8.4", ports="22", outcome="cancelled", reason=""),
        rest.LedgerEntry(address="127.9.8.5", ports="22", outcome="cancelled", reason=""),
        rest.LedgerEntry(address="127.9.8.9", ports="22", outcome="lost", reason="nmap\x1b crashed"),
        rest.LedgerEntry(address="127.9.8.8", ports="22", outcome="down", reason=""),
    ]


def test_list_of_the_jobs_of_an_object_that_cannot_be_read_is_filtered(jobs: FakeApi, run: Any) -> None:
    """An id of a deleted object, or of another user's, is sent as it is, and not looked up."""
    jobs.requests.clear()
    assert run("job", "list", "--subnet", "98", "--policy", "99", "-o", "json").code == 0
    (listed,) = jobs.requests
    assert (listed.url.params["subnet_id"], listed.url.params["policy_id"]) == ("98", "99")


def test_ledger_of_a_partial_job_lists_reasons(jobs: FakeApi, run: Any) -> None:
    """The ledger shows nine outcomes, whether the job is accounted for, and the reasons of addresses that were not probed."""
    partly(jobs.jobs[41])
    shown = run("job", "ledger", "41").out
    assert [line.split("  ")[0].strip() for line in shown.splitlines()[:9]] == [
        name.replace("_", " ") for name in rest.LedgerCounts.model_fields
    ]
    assert "accounted: no\n3 of 256 addresses were NOT probed\n" in shown
    assert "  cancelled (127.9.8.4/31)\n" in shown
    assert "  nmap\\x1b crashed (127.9.8.9)\n" in shown


def test_ledger_with_not_probed_lists_addresses(jobs: FakeApi, run: Any) -> None:
    """--not-probed lists addresses, --networks collapses them, --outcome selects them."""
    partly(jobs.jobs[41])
    assert run("job", "ledger", "41", "--not-probed").out.splitlines() == [
        "127.9.8.4\t22\tcancelled\t",
        "127.9.8.5\t22\tcancelled\t",
        "127.9.8.9\t22\tlost\tnmap\\x1b crashed",
    ]
    assert run("job", "ledger", "41", "--networks", "--outcome", "cancelled").out == "127.9.8.4/31\tcancelled\t\n"
    assert run("job", "ledger", "41", "--outcome", "down", "-o", "name").out == "127.9.8.8\n"


def test_ledger_of_a_service_without_positions_is_reported_as_incomplete(jobs: FakeApi, run: Any) -> None:
    """An answer without a next position, as of an orchestrator of release 0.2, must not be taken for the whole list."""
    partly(jobs.jobs[41])
    old = jobs.jobs[41].ledger().model_dump(mode="json", exclude={"not_probed": {"next"}})
    old["not_probed"] |= {"addresses": old["not_probed"]["addresses"][:1], "page_size": 1}
    jobs.fault_of = lambda _: httpx2.Response(200, json=old)
    ended = run("job", "ledger", "41", "--not-probed")
    assert len(ended.out.splitlines()) == 1
    assert "the service has listed 1 of 4 addresses" in ended.err


def test_cancel_of_an_ended_job_exits_2_with_the_time(jobs: FakeApi, run: Any) -> None:
    """A job that has ended cannot be cancelled, and the others still are."""
    ended = run("job", "cancel", "41", "42")
    assert ended.code == 2
    assert "job 41 could not be cancelled: Job is already completed (since 2026-03-14T09:01:07Z)" in ended.err
    assert "✓ job 42 cancelled" in ended.err
    assert jobs.jobs[42].status is JobStatus.CANCELLED


def test_cancel_with_wait_prints_the_final_state_and_exits_0(jobs: FakeApi, run: Any) -> None:
    """The end of each cancelled job is printed, and the error of another job still decides the exit code."""
    jobs.jobs[42].counts = {"answered": 250, "cancelled": 6}
    ended = run("job", "cancel", "42", "--wait")
    assert ended.code == 0
    assert "job 42 cancelled 62%" in ended.err
    assert "6 of 256 addresses were NOT probed" in ended.err
    run("scan", "127.9.8.0/24", "--no-watch")
    ended = run("job", "cancel", "41", "43", "--wait")
    assert ended.code == 2
    assert "job 43 cancelled 62%" in ended.err
    assert "job 41 could not be cancelled" in ended.err


def test_submit_checks_fields_against_the_objects_that_it_prints(jobs: FakeApi, run: Any) -> None:
    """JSON lines of a watch are states of jobs, and all other formats have the created jobs."""
    submit = ("job", "submit", "--subnet", "5", "--policy", "3")
    jobs.requests.clear()
    assert run(*submit, "--watch", "-o", "jsonl", "--json", "id").code == 2
    assert run(*submit, "--json", "job_id").code == 2
    assert not jobs.requests
    assert json.loads(run(*submit, "--json", "id").out) == [{"id": 43}]
    lines = run(*submit, "--watch", "-o", "jsonl", "--json", "job_id").out.splitlines()
    assert set(lines) == {'{"job_id":"44"}'}


def test_cancel_with_a_wait_that_fails_prints_the_errors_of_other_jobs(jobs: FakeApi, run: Any) -> None:
    """A job that could not be cancelled is reported, also if the watch of the others fails."""
    failed = httpx2.Response(500, json={"error": "no"})
    jobs.fault_of = lambda request: failed if request.url.path.endswith("/events") else None
    ended = run("job", "cancel", "41", "42", "--wait")
    assert ended.code == 1
    assert "job 41 could not be cancelled" in ended.err


def test_cancel_of_all_jobs_with_wait_waits_for_each(jobs: FakeApi, run: Any) -> None:
    """The service names the jobs that it cancelled."""

    def cancelled(request: httpx2.Request) -> httpx2.Response | None:
        if request.url.path != "/api/v1/task/cancel":
            return None
        jobs.jobs[42].states = [(JobStatus.CANCELLED, 62)]
        return httpx2.Response(200, json={"message": "1 job cancelled", "job_ids": [42]})

    jobs.fault_of = cancelled
    ended = run("job", "cancel", "--all-mine", "--yes", "--wait")
    assert ended.code == 0
    assert "job 42 cancelled 62%" in ended.err


def test_cancel_after_a_cut_answer_counts_as_done(jobs: FakeApi, run: Any) -> None:
    """When the repeated cancel finds the job cancelled, the attempt that was cut did it."""

    def fault(request: httpx2.Request) -> Exception | None:
        if request.url.path.endswith("/cancel"):
            jobs.fault_of = lambda _request: None
            jobs.carry_out(request)
            return httpx2.ReadError("connection reset")
        return None

    jobs.fault_of = fault
    ended = run("job", "cancel", "42")
    assert ended.code == 0
    assert ended.err.endswith("repeating the request for up to 60 s\n✓ job 42 cancelled\n")


def test_delete_of_an_unfinished_job_exits_2_and_deletes_the_others(jobs: FakeApi, run: Any) -> None:
    """The error of a running job has a hint, and the ended job is deleted."""
    ended = run("job", "delete", "42", "41", "--yes")
    assert ended.code == 2
    assert "✓ job 41 deleted" in ended.err
    assert "job 42: Job is running; cancel it first" in ended.err
    assert "`scanfleet job cancel 42`" in ended.err
    assert list(jobs.jobs) == [42]


@pytest.mark.usefixtures("jobs")
def test_delete_of_missing_jobs_names_each(run: Any) -> None:
    """Each error names its job, and has a hint and the request id."""
    ended = run("job", "delete", "1", "2", "--yes")
    assert ended.code == 5
    each = (
        "scanfleet: job {}: Job not found\n  it does not exist, or is not yours: scanfleet job list\n  request c0ffee\n"
    )
    assert ended.err == each.format(1) + each.format(2)


def test_delete_of_a_job_needs_yes_without_a_terminal(jobs: FakeApi, run: Any) -> None:
    """Without a terminal to confirm on, nothing is deleted."""
    ended = run("job", "delete", "41")
    assert ended.code == 2
    assert "delete 1 job (41) with all results?: needs --yes without a terminal" in ended.err
    assert list(jobs.jobs) == [41, 42]


def test_delete_after_a_cut_answer_counts_as_done(jobs: FakeApi, run: Any) -> None:
    """A 404 on the repeat means that the attempt whose answer was cut deleted the job."""

    def fault(request: httpx2.Request) -> Exception | None:
        if request.method == "DELETE" and 41 in jobs.jobs:
            jobs.carry_out(request)
            return httpx2.ReadError("connection reset")
        return None

    jobs.fault_of = fault
    ended = run("job", "delete", "41", "--yes")
    assert ended.code == 0
    assert ended.err.endswith("repeating the request for up to 60 s\n✓ job 41 deleted\n")


@pytest.mark.parametrize("command", [["job", "show", "41"], ["job", "list", "-o", "wide"]])
def test_busy_service_is_not_reported_as_a_missing_object(jobs: FakeApi, run: Any, command: list[str]) -> None:
    """Only a missing object is omitted; every other error ends the command with its exit code."""

    def fault(request: httpx2.Request) -> httpx2.Response | None:
        busy = request.url.path.endswith("/ledger") if command[1] == "show" else request.url.path.endswith("/41")
        return httpx2.Response(503, json={"error": "busy"}) if busy else None

    jobs.fault_of = fault
    ended = run("--retry", "0", *command)
    assert ended.code == 6
    assert "busy" in ended.err


@pytest.mark.usefixtures("jobs")
def test_cancel_of_all_jobs_without_a_terminal_needs_yes(run: Any) -> None:
    """Without a terminal to confirm on, a destructive command needs --yes."""
    ended = run("job", "cancel", "--all-mine")
    assert ended.code == 2
    assert "needs --yes without a terminal" in ended.err


@pytest.mark.usefixtures("jobs")
def test_waiting_for_running_ends_when_the_job_runs(run: Any) -> None:
    """`wait --for running` does not wait for the end, and `--all` waits for the unfinished."""
    ended = run("job", "wait", "42", "--for", "running")
    assert (ended.code, ended.out, ended.err) == (0, "", "job 42 running\n")
    assert run("job", "wait", "--all", "--for", "running").code == 0


def test_wait_for_all_jobs_does_not_miss_one_that_moves_to_a_page_that_was_read(jobs: FakeApi, run: Any) -> None:
    """Jobs that end between the pages move the others forward, and a job that is created meanwhile is not waited for."""
    for number in (*range(43, 50), 250, *range(51, 153)):
        jobs.jobs[number] = FakeJob(number, 5, 3, [(JobStatus.RUNNING, 10), (JobStatus.COMPLETED, 100)])
    jobs.jobs[250].states[-1] = (JobStatus.FAILED, 99)
    pages: list[str] = []

    def ends(request: httpx2.Request) -> None:
        if (request.method, request.url.path) != ("GET", "/api/v1/task"):
            return
        pages.append(request.url.params["page"])
        if pages == ["1", "2"]:  # job 250 is on it, and ten jobs of the first page end
            for number in range(143, 153):
                jobs.jobs[number].seq = 2
            jobs.jobs[200] = FakeJob(200, 5, 3, [(JobStatus.RUNNING, 10)])
            jobs.jobs[200].created_at = NOW + timedelta(seconds=1)

    jobs.fault_of = ends
    ended = run("job", "wait", "--all", "--timeout", "60s")
    assert ended.code == 3
    assert "job 250 failed" in ended.err
    assert "job 200" not in ended.err


@pytest.mark.usefixtures("jobs")
def test_events_are_json_lines(run: Any) -> None:
    """`job events` prints each state of the stream."""
    lines = [json.loads(line) for line in run("job", "events", "42").out.splitlines()]
    assert [line["status"]["progress"] for line in lines] == [62, 100]


@pytest.mark.parametrize("command", [["job", "events", "42"], ["job", "list", "--watch"]])
def test_notice_of_a_lost_connection_is_escaped(jobs: FakeApi, run: Any, command: list[str]) -> None:
    """The body of an error controls no terminal."""
    opened = [0]

    def fault(request: httpx2.Request) -> BaseException | httpx2.Response | None:
        opened[0] += request.url.path.endswith("/events")
        if opened[0] == 2:
            raise KeyboardInterrupt
        return httpx2.Response(502, json={"error": "bad \x1b[2J"}) if request.url.path.endswith("/events") else None

    jobs.fault_of = fault
    ended = run(*command)
    assert "bad \\x1b[2J" in ended.err
    assert "\x1b" not in ended.err


def test_job_show_with_open_opens_the_page(jobs: FakeApi, run: Any, effects: Effects) -> None:
    """--open prints the block and opens the page of the job."""
    assert jobs
    opened: list[str] = []

    def browse(url: str) -> bool:
        opened.append(url)
        return True

    ended = run("job", "show", "41", "--open", effects=replace(effects, browse=browse))
    assert ended.out.startswith("job 41  completed")
    assert opened == ["http://scanfleet.test/app/jobs/41"]


def test_map_is_a_square_of_letters(jobs: FakeApi, run: Any) -> None:
    """A /24 is 16 rows of 16 letters under their address, and the legend names those that occur."""
    block = {"ports": "22", "letters": "a" * 15 + "l" + "s" * 240}
    other = {"ports": "80", "letters": "d" * 16 + "s" * 239 + "t"}
    drawn = {
        "job_id": 41,
        "seq": 3,
        "status": "failed",
        "first": "127.9.8.0",
        "addresses": 256,
        "blocks": [block, other],
    }
    jobs.answers["GET", "/api/v1/task/41/map"] = drawn
    lines = run("job", "map", "41").out.splitlines()
    assert lines[0] == "127.9.8.0    aaaaaaaaaaaaaaal"
    assert lines[15] == "127.9.8.240  ssssssssssssssst"
    assert lines[16:] == ["a answered · s silent · t timed out · l lost"]
    assert json.loads(run("job", "map", "41", "-o", "json").out) == drawn


def test_map_of_a_large_network_shows_the_worst_of_each_block(jobs: FakeApi, run: Any) -> None:
    """A large network is drawn as blocks, each with its worst letter, and the legend has the size of a block."""
    letters = "a" * 65_535 + "l"
    drawn = {"job_id": 41, "seq": 3, "status": "failed", "first": "127.9.0.0", "addresses": 65_536}
    jobs.answers["GET", "/api/v1/task/41/map"] = drawn | {"blocks": [{"ports": "22", "letters": letters}]}
    lines = run("job", "map", "41").out.splitlines()
    assert lines[0] == "127.9.0.0    " + "a" * 64
    assert lines[63] == "127.9.252.0  " + "a" * 63 + "l"
    assert lines[65] == "each cell is a /28: the worst of its addresses"
    narrow = run("--color", "never", "job", "map", "41", width=60)
    assert narrow.err == "too wide for this terminal: showing /24s\n"
    assert narrow.out.splitlines()[15] == "127.9.240.0  " + "a" * 15 + "l"
    assert narrow.out.splitlines()[17] == "each cell is a /24: the worst of its addresses"
    lines = run("job", "map", "41", "--block", "20", "--width", "4", "--ascii").out.splitlines()
    assert lines == [
        "127.9.0.0    aaaa", "127.9.64.0   aaaa", "127.9.128.0  aaaa", "127.9.192.0  aaal",
        "a answered, l lost", "each cell is a /20: the worst of its addresses",
    ]  # fmt: skip
    assert run("job", "map", "41", "--block", "8").code == 2


@pytest.mark.parametrize("first", ["10.0.0.0", "2001:db8::"])
def test_map_of_more_addresses_than_a_response_is_by_chunk(jobs: FakeApi, run: Any, first: str) -> None:
    """A network that is too large for a letter per address, or an IPv6 network, has a cell per chunk, unless asked otherwise."""
    drawn = {"job_id": 41, "seq": 3, "status": "failed", "first": first}
    asked: list[dict[str, str]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(dict(request.url.params))
        if request.url.params.get("by") == "chunk":
            blocks = [{"ports": "22", "letters": "a" * 127 + "l"}]
            return httpx2.Response(200, json=drawn | {"addresses": 131_072, "step": 1_024, "blocks": blocks})
        if ":" not in first and "from" not in request.url.params:
            return httpx2.Response(413, json={"error": "too large, as in ?by=chunk"})
        return httpx2.Response(
            200, json=drawn | {"addresses": 2_048, "blocks": [{"ports": "22", "letters": "s" * 2_048}]}
        )

    jobs.answers["GET", "/api/v1/task/41/map"] = answer
    prefix = 128 - 10 if ":" in first else 32 - 10
    lines = run("job", "map", "41").out.splitlines()
    assert [line.split()[1] for line in lines[:8]] == ["a" * 16] * 7 + ["a" * 15 + "l"]
    assert lines[0].split()[0] == first
    assert lines[-1] == f"each cell is a /{prefix}: the worst of its addresses"
    assert asked == [{}, {"by": "chunk"}]
    coarse = run("job", "map", "41", "--by", "chunk", "--block", str(prefix - 4), "--width", "8").out.splitlines()
    assert coarse[0].split() == [first, "a" * 7 + "l"]
    assert run("job", "map", "41", "--by", "chunk", "--block", str(prefix + 1)).code == 2
    asked.clear()
    assert run("job", "map", "41", "--from", first).code == 0
    assert asked == [{"from": first}]
    assert run("job", "map", "41", "--by", "address").code == (0 if ":" in first else 2)


@pytest.mark.parametrize(
    ("first", "letters", "rows"),
    [
        ("127.9.8.5", "a" * 11 + "l" + "a" * 16, ["127.9.8.0   al", "127.9.8.32  a"]),
        ("127.9.8.4", "a" * 7 + "l", ["127.9.8.0  l"]),
    ],
)
def test_cells_of_a_map_are_whole_prefixes(jobs: FakeApi, run: Any, first: str, letters: str, rows: list[str]) -> None:
    """A map that starts or ends within a prefix has the rest of it in its first or last cell."""
    drawn = {"job_id": 41, "seq": 3, "status": "failed", "first": first, "addresses": len(letters)}
    jobs.answers["GET", "/api/v1/task/41/map"] = drawn | {"blocks": [{"ports": "22", "letters": letters}]}
    lines = run("job", "map", "41", "--block", "28", "--width", "2").out.splitlines()
    assert lines[: len(rows)] == rows
    assert lines[-1] == "each cell is a /28: the worst of its addresses"
