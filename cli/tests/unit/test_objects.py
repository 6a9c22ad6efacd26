"""`scanfleet subnet`, `policy`, `context`, `api`, `audit`, `doctor` and `whoami`."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.shell_completion import ShellComplete

from scanfleet.scanning.targets import TargetRules
from scanfleet_cli import main
from scanfleet_cli.config import Config
from scanfleet_cli.output import Output
from scanfleet_cli.session import COMPLETE, Effects, Session
from scanfleet_cli_testing.api import TOKEN, FakeApi


def test_subnet_is_made_shown_changed_and_deleted(api: FakeApi, run: Any) -> None:
    """Commands take the name or the id of a subnet, and its line has the number of excluded addresses."""
    made = run("subnet", "create", "lab", "127.9.8.0/24", "--exclude", "127.9.8.128/25")
    assert made.out == "subnet 5 lab 127.9.8.0/24 (256 addresses, 128 excluded)\n"
    assert run("subnet", "list", width=60).out.splitlines()[1].split() == ["5", "lab", "127.9.8.0/24", "127.9.8.128/25"]
    edited = run("subnet", "edit", "lab", "--name", "web", "--remove-exclude", "127.9.8.128/25")
    assert edited.err == "was  subnet 5 lab 127.9.8.0/24 (256 addresses, 128 excluded)\n"
    assert edited.out == "is   subnet 5 web 127.9.8.0/24 (256 addresses)\n"
    assert json.loads(run("subnet", "show", "web", "-o", "json").out) == api.subnets[5]
    assert run("subnet", "delete", "web", "--yes").err == "✓ subnet 5 deleted\n"
    assert run("subnet", "show", "5").code == 5
    assert run("subnet", "show", "web").code == 5


def test_exclusion_in_two_notations_is_removed_once(api: FakeApi, run: Any) -> None:
    """An address and its /32 are one exclusion; what is none of the subnet is refused."""
    run("subnet", "create", "lab", "127.9.8.0/24", "--exclude", "127.9.8.5/32")
    unknown = run("subnet", "edit", "lab", "--remove-exclude", "127.9.8.6")
    assert (unknown.code, "not an exclusion of this subnet" in unknown.err) == (2, True)
    assert run("subnet", "edit", "lab", "--remove-exclude", "127.9.8.5", "--remove-exclude", "127.9.8.5/32").code == 0
    assert api.subnets[5]["exclude"] == []


def test_subnet_that_is_listed_twice_is_not_ambiguous(api: FakeApi, run: Any) -> None:
    """A subnet that is created between two pages moves the others back, so that one of them is on both."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    api.subnets |= {5 + each: api.subnets[5] | {"id": 5 + each, "name": f"lab{each}"} for each in range(101)}

    def create(request: httpx2.Request) -> None:
        if request.method == "GET" and request.url.params.get("page") == "2":
            api.fault_of = lambda _request: None
            run("subnet", "create", "new", "127.9.9.0/24")

    api.fault_of = create
    ended = run("subnet", "show", "lab1", "-o", "name")  # the last one of the first page
    assert (ended.code, ended.out) == (0, "6\n"), ended.err


def test_change_by_another_in_between_is_reported(api: FakeApi, run: Any) -> None:
    """An edit sends If-Match, and changes nothing if the object has changed since it was read."""
    run("subnet", "create", "lab", "127.9.8.0/24")

    def fault(request: httpx2.Request) -> None:
        if request.method == "PUT":
            api.subnets[5]["name"] = "theirs"

    api.fault_of = fault
    ended = run("subnet", "edit", "5", "--name", "mine")
    assert ended.code == 2
    assert "nothing was changed" in ended.err
    assert api.subnets[5]["name"] == "theirs"


@pytest.mark.parametrize("kind", ["subnet", "policy"])
def test_delete_with_a_repeated_object_sends_one_request(run: Any, kind: str) -> None:
    """The same object by its id and by its name is one."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    run("policy", "create", "lab")
    number = {"subnet": "5", "policy": "3"}[kind]
    ended = run(kind, "delete", "lab", number, "--yes")
    assert (ended.code, ended.err) == (0, f"✓ {kind} {number} deleted\n")


@pytest.mark.parametrize(
    ("kind", "number", "change"), [("subnet", 5, "--cidr=127.9.9.0/24"), ("policy", 3, "--timing=2")]
)
def test_object_given_by_id_is_read_once(api: FakeApi, run: Any, kind: str, number: int, change: str) -> None:
    """An id needs no request to find it."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    run("policy", "create", "lab")
    for command in (["show"], ["edit", change]):
        api.requests.clear()
        assert run(kind, command[0], number, *command[1:]).code == 0
        reads = [each.url.path for each in api.requests if each.method == "GET"]
        assert reads == [f"/api/v1/{kind}/{number}"]


def test_delete_after_a_cut_answer_counts_as_done(api: FakeApi, run: Any) -> None:
    """A 404 on the repetition of a delete that was cut counts as done."""
    run("subnet", "create", "lab", "127.9.8.0/24")

    def fault(request: httpx2.Request) -> Exception | None:
        if request.method == "DELETE" and api.subnets:
            api.carry_out(request)
            return httpx2.ReadError("connection reset")
        return None

    api.fault_of = fault
    assert run("subnet", "delete", "5", "--yes").code == 0


def test_subnets_of_a_file_are_imported_once(api: FakeApi, run: Any, tmp_path: Path) -> None:
    """The service creates the missing subnets, so that a repeat creates none."""
    run("subnet", "create", "old", "127.9.8.0/24")
    file = tmp_path / "networks.csv"
    file.write_text("\ufeffname,cidr,exclude\nold,127.9.8.0/24,\nnew,127.9.9.0/24,127.9.9.1/32;127.9.9.128/25\n")
    assert run("subnet", "import", file).out == "1 created, 1 unchanged\n"
    assert api.requests[-1].headers["content-type"] == "text/csv"
    assert api.subnets[6]["exclude"] == ["127.9.9.1/32", "127.9.9.128/25"]
    assert run("subnet", "import", file).out == "0 created, 2 unchanged\n"
    assert json.loads(run("subnet", "import", file, "-o", "json").out) == [
        {"line": 2, "action": "exists", "id": 5, "error": None},
        {"line": 3, "action": "exists", "id": 6, "error": None},
    ]


def test_import_creates_the_subnets_of_valid_lines_and_exits_2_for_others(
    api: FakeApi, run: Any, tmp_path: Path
) -> None:
    """A refused line is named with its error, and the ids of the others are printed."""
    file = tmp_path / "networks.csv"
    file.write_text("name,cidr\none,127.9.8.0/24\nbad,127.9.9.1/24\ntwo,127.9.10.0/24\ntwo,127.9.10.0/24\n")
    ended = run("subnet", "import", file, "-o", "json")
    assert ended.code == 2
    bad = {"line": 3, "action": "refused", "id": None, "error": "127.9.9.1/24 has host bits set"}
    assert json.loads(ended.out) == [
        {"line": 2, "action": "create", "id": 5, "error": None},
        bad,
        {"line": 4, "action": "create", "id": 6, "error": None},
        {"line": 5, "action": "exists", "id": 6, "error": None},
    ]
    assert [each["name"] for each in api.subnets.values()] == ["one", "two"]
    ended = run("subnet", "import", file)
    assert (ended.code, ended.out) == (2, "0 created, 3 unchanged, 1 refused: line 3: 127.9.9.1/24 has host bits set\n")


def test_dry_run_of_an_import_changes_nothing(api: FakeApi, run: Any, tmp_path: Path) -> None:
    """The verdict on each line is printed, and no request changes a subnet."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    before = dict(api.subnets)
    file = tmp_path / "networks.csv"
    file.write_text("name,cidr\nlab,127.9.9.0/24\nnew,127.9.10.0/24\n")
    assert run("subnet", "import", file, "--dry-run").out == "2 to create, 0 unchanged\n"
    ended = run("subnet", "import", file, "--dry-run", "--update")
    assert (ended.code, ended.out) == (0, "1 to create, 0 unchanged, 1 to update\n")
    assert api.subnets == before


def test_import_with_update_sends_the_accepted_lines_once(api: FakeApi, run: Any, tmp_path: Path) -> None:
    """The service decides what is updated; the import has the lines that it accepts, as they are in the file."""
    run("subnet", "create", "lab", "127.9.0.0/24")
    file = tmp_path / "networks.csv"
    file.write_text('exclude,name,cidr\n127.9.0.1,lab,127.9.0.0/24\n,"a\nb",127.9.9.1/24\n\n,"c, d",127.9.8.0/24\n')
    ended = run("subnet", "import", file, "--update", "-o", "json")
    assert ended.code == 2
    assert [(each["line"], each["action"], each["id"]) for each in json.loads(ended.out)] == [
        (2, "update", 5),
        (4, "refused", None),
        (6, "create", 6),
    ]
    assert api.requests[-1].url.query == b"update=true"
    assert api.requests[-1].content == b'exclude,name,cidr\n127.9.0.1,lab,127.9.0.0/24\n\n,"c, d",127.9.8.0/24\n'
    assert api.subnets[5]["exclude"] == ["127.9.0.1/32"]
    assert not [each for each in api.requests if each.method == "PUT"]


def cut_after_the_first_put(api: FakeApi, theirs: dict[str, Any]) -> None:
    """Carry out the next PUT, change the subnet as another request would, and cut the response."""
    puts: list[httpx2.Request] = []

    def fault(request: httpx2.Request) -> Exception | None:
        if request.method == "PUT" and not puts:
            puts.append(request)
            api.carry_out(request)
            api.subnets[5] |= theirs
            return httpx2.ReadError("connection reset")
        return None

    api.fault_of = fault


@pytest.mark.parametrize(
    ("change", "is_"),
    [
        (["--name", "web"], "subnet 5 web 127.9.8.0/24 (256 addresses)"),
        (["--add-exclude", "127.9.8.5"], "subnet 5 lab 127.9.8.0/24 (256 addresses, 1 excluded)"),
    ],
)
def test_edit_after_a_cut_answer_counts_as_done(api: FakeApi, run: Any, change: list[str], is_: str) -> None:
    """When the repeated PUT finds the subnet as sent, in the notation of the service, the attempt that was cut did it."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    cut_after_the_first_put(api, {})
    ended = run("subnet", "edit", "5", *change)
    assert (ended.code, ended.out) == (0, f"is   {is_}\n")


def test_edit_after_a_cut_answer_of_a_different_object_exits_1(api: FakeApi, run: Any) -> None:
    """The attempt that was cut may have changed the object before another request did."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    cut_after_the_first_put(api, {"exclude": ["127.9.8.9/32"]})
    ended = run("subnet", "edit", "5", "--name", "web")
    assert ended.code == 1
    assert "an attempt without a response may have changed it" in ended.err
    assert "nothing was changed" not in ended.err


def test_import_of_a_file_that_is_not_utf_8_exits_2(api: FakeApi, run: Any, tmp_path: Path) -> None:
    """The error names the file, and nothing is sent."""
    file = tmp_path / "networks.csv"
    file.write_bytes(b"name,cidr\n\xff,\n")
    ended = run("subnet", "import", file)
    assert ended.code == 2
    assert "is not UTF-8" in ended.err
    assert not api.requests


def test_policy_is_made_shown_changed_and_explained(run: Any) -> None:
    """A policy shows every field, an edit keeps what it does not name, and explain counts ports."""
    made = run(
        "policy", "create", "web", "--preset", "quick", "--ports", "T:22,80,U:53", "--scripts", "banner,ssl-cert"
    )
    assert "  ports              T:22,80,U:53\n" in made.out
    edited = run("policy", "edit", "web", "--timing", "2")
    assert edited.err == "timing: 4 → 2\n"
    assert "  scripts            banner,ssl-cert\n" in edited.out
    explained = json.loads(run("policy", "explain", "web", "-o", "json").out)
    assert explained == {"policy_id": 3, "tcp_ports": 2, "udp_ports": 1, "needs_raw_packets": True}
    assert run("policy", "edit", "web").code == 2
    assert run("policy", "delete", "web", "--yes").code == 0


ESTIMATE = {
    "addresses": 256,
    "excluded": 129,
    "exclude": ["127.9.8.128/25", "127.9.8.1/32"],
    "tcp_ports": 100,
    "udp_ports": 0,
    "probes": 12_700,
    "chunks": 2,
    "estimate_seconds": 41.3,
    "needs_raw_packets": False,
    "nmap_options": ["-v", "-n", "-sT", "--top-ports", "100"],
    "refusals": [{"rule": "grant", "field": None, "error": "timing 4 is above 3, the highest of grant site"}],
}


@pytest.mark.parametrize(
    ("subnet", "sent", "line"),
    [
        ("lab", {"subnet_id": 5}, "subnet 5 lab 127.9.8.0/24"),
        ("5", {"subnet_id": 5}, "subnet 5 lab 127.9.8.0/24"),
        ("127.9.8.0/24", {"subnet_id": 5}, "subnet 5 lab 127.9.8.0/24"),
        ("127.9.9.1", {"cidr": "127.9.9.1/32"}, "network 127.9.9.1/32"),
    ],
)
def test_policy_is_explained_for_a_subnet_by_the_estimate(
    api: FakeApi, run: Any, subnet: str, sent: dict[str, Any], line: str
) -> None:
    """Numbers, excluded networks, options of nmap and reasons to refuse a scan are those of the API."""
    run("policy", "create", "web", "--preset", "quick")
    run("subnet", "create", "lab", "127.9.8.0/24")
    api.answers["POST", "/api/v1/task/estimate"] = ESTIMATE
    assert run("policy", "explain", "web", "--subnet", subnet).out.splitlines() == [
        "policy 3 web",
        line,
        "  ports             100 TCP, 0 UDP",
        "  needs raw packets no",
        "  addresses         256 (129 excluded: 127.9.8.128/25, 127.9.8.1/32)",
        "  probes            12,700",
        "  chunks            2",
        "  estimate          0:41 of one slot",
        "  nmap options      -v -n -sT --top-ports 100",
        "  refused           grant: timing 4 is above 3, the highest of grant site",
    ]
    assert json.loads(api.requests[-1].content) == {"policy_id": 3} | sent
    explained = json.loads(run("policy", "explain", "3", "--subnet", subnet, "-o", "json").out)
    assert explained == {"policy_id": 3, "subnet_id": sent.get("subnet_id")} | ESTIMATE


def test_policy_is_not_explained_for_an_unknown_subnet(run: Any) -> None:
    """A name of no subnet that is not a network either is refused without a request for an estimate."""
    run("policy", "create", "web", "--preset", "quick")
    assert run("policy", "explain", "web", "--subnet", "lab").code == 5


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, "cidr: 10.0.0.0/8 is too large", 2),
        (404, "Subnet not found", 5),
        (404, "Not Found", 1),
        (405, "Method Not Allowed", 1),
    ],
)
def test_refused_estimate_has_the_exit_code_of_its_cause(
    api: FakeApi, run: Any, status: int, error: str, code: int
) -> None:
    """A service without estimates is distinguished from a subnet that does not exist."""
    run("policy", "create", "web", "--preset", "quick")
    api.answers["POST", "/api/v1/task/estimate"] = httpx2.Response(status, json={"error": error})
    ended = run("policy", "explain", "web", "--subnet", "127.9.9.0/24")
    assert (ended.code, ended.out) == (code, "")
    assert ("this service does not support estimates of scans" if code == 1 else error) in ended.err


@pytest.mark.parametrize(
    "command",
    [
        ("whoami",),
        ("limits",),
        ("deletion", "list"),
        ("subnet", "retention", "5"),
        ("subnet", "import", os.devnull),
        ("job", "snapshot", "41"),
    ],
)
@pytest.mark.parametrize(("status", "error"), [(404, "Not Found"), (405, "Method Not Allowed")])
def test_operation_that_an_older_service_lacks_is_reported_as_such(
    api: FakeApi, run: Any, command: tuple[str, ...], status: int, error: str
) -> None:
    """A missing route is no missing object."""
    api.fault_of = lambda _request: httpx2.Response(status, json={"error": error})
    ended = run(*command)
    assert ended.code == 1
    assert "older than this command" in ended.err


def test_contexts_are_kept_with_the_comments_of_their_file(run: Any, tmp_path: Path) -> None:
    """Contexts are added, used, shown and removed, and the file is readable by its owner alone."""
    file = tmp_path / "config.toml"
    assert run("context", "add", "prod", "--url", "https://scanfleet.example.com/", environment={}).code == 0
    file.write_text(file.read_text() + "# keep me\n")
    command = f"echo {TOKEN}"
    run(
        "context",
        "add",
        "lab",
        "--url",
        "http://scanfleet.test",
        "--token-command",
        command,
        "--no-use",
        environment={},
    )
    assert "# keep me" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    listed = json.loads(run("context", "list", "-o", "json", environment={}).out)
    assert [(each["name"], each["current"]) for each in listed] == [("prod", True), ("lab", False)]
    assert run("--context", "lab", "subnet", "list", environment={}).code == 0
    assert run("context", "use", "lab", environment={}).code == 0
    assert run("subnet", "list", environment={}).code == 0
    assert run("context", "remove", "lab", "--yes", environment={}).code == 0
    assert run("context", "use", "lab", environment={}).code == 5
    assert run("subnet", "list", environment={}).code == 2


def test_token_of_a_context_is_sent_to_no_other_gateway(run: Any) -> None:
    """With another address by a flag, a context's token command is not run."""
    run("context", "add", "lab", "--url", "http://scanfleet.test", "--token-command", f"echo {TOKEN}", environment={})
    assert run("--url", "http://elsewhere.test", "subnet", "list", environment={}).code == 4


def test_token_sources_have_the_order_option_environment_context(run: Any, tmp_path: Path) -> None:
    """A token file of an option precedes the environment, and the environment precedes a context."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text(f"\ufeff{TOKEN}\n")
    bad.write_text("stale")
    url = {"SCANFLEET_URL": "http://scanfleet.test"}
    assert run("--token-file", good, "subnet", "list", environment=url | {"SCANFLEET_TOKEN": "stale"}).code == 0
    environment = url | {"SCANFLEET_TOKEN": TOKEN, "SCANFLEET_TOKEN_FILE": str(bad)}
    assert run("subnet", "list", environment=environment).code == 0
    assert run("subnet", "list", environment=url | {"SCANFLEET_TOKEN_FILE": str(bad)}).code == 4
    run("context", "add", "lab", "--url", "http://scanfleet.test", "--token-command", "false", environment={})
    failed = run("subnet", "list", environment={})
    assert failed.code == 4
    assert "the token command failed" in failed.err


def test_token_of_the_environment_is_not_sent_to_the_gateway_of_an_option(run: Any, tmp_path: Path) -> None:
    """SCANFLEET_TOKEN and SCANFLEET_TOKEN_FILE belong to SCANFLEET_URL, not to the gateway of --context."""
    (tmp_path / "token").write_text(TOKEN)
    run("context", "add", "lab", "--url", "http://scanfleet.test", environment={})
    for environment in ({"SCANFLEET_TOKEN": TOKEN}, {"SCANFLEET_TOKEN_FILE": str(tmp_path / "token")}):
        assert run("subnet", "list", environment=environment).code == 0
        ended = run("--context", "lab", "subnet", "list", environment=environment)
        assert ended.code == 4
        assert "scanfleet --context lab login http://scanfleet.test, or add --token-file FILE" in ended.err
    assert run("--context", "lab", "--token-file", tmp_path / "token", "subnet", "list", environment={}).code == 0


def test_api_sends_fields_and_reads_all_pages(api: FakeApi, run: Any) -> None:
    """A raw request carries fields as its body, and a list of all pages is one array."""
    made = run("api", "POST", "subnet", "-f", "name=lab", "-f", "cidr=127.9.8.0/24", "-F", 'exclude=["127.9.8.1/32"]')
    assert json.loads(made.out) == api.subnets[5]
    assert json.loads(run("api", "get", "/api/v1/subnet", "--all").out) == [api.subnets[5]]
    assert run("api", "GET", "/api/v1/subnet/99").code == 5
    assert run("api", "GET", "subnet", "-F", "page=one").code == 2


@pytest.mark.parametrize("options", [[], ["--all"], ["-f", "policy_id=3"]])
def test_api_keeps_the_query_of_the_path(api: FakeApi, run: Any, options: list[str]) -> None:
    """Pages and fields are added to the parameters of the path, and do not replace them."""
    assert run("api", "GET", "task?status=failed&status=cancelled", *options).code == 0
    query = api.requests[-1].url.params
    assert query.get_list("status") == ["failed", "cancelled"]
    assert query.get("page_size") == ("100" if "--all" in options else None)
    assert query.get("policy_id") == ("3" if "-f" in options else None)


def test_audit_log_is_listed_by_filter(api: FakeApi, run: Any) -> None:
    """Filters are passed on, and what is for administrators exits 4."""
    entry: dict[str, Any] = {
        "time": "t",
        "subject": "7",
        "action": "task.create",
        "target": "task 41",
        "decision": "allowed",
    }
    entry |= {"rule": "", "source": "127.0.0.1", "reason": "", "request_id": "c0ffee"}
    api.answers["GET", "/api/v1/audit"] = {"entries": [entry], "total": 1, "page": 1, "page_size": 30}
    ended = run("audit", "list", "--subject", "7", "--request", "c0ffee")
    assert ended.out == "t\t7\ttask.create\ttask 41\tallowed\t\t127.0.0.1\n"
    assert dict(api.requests[-1].url.params) == {"subject": "7", "request_id": "c0ffee", "page": "1", "page_size": "30"}
    entry["genuine"] = False
    assert "\tallowed (not genuine)\t" in run("audit", "list").out
    api.answers["GET", "/api/v1/audit"] = httpx2.Response(403, json={"error": "for administrators"})
    assert run("audit", "list").code == 4
    assert run("audit", "list", "--decision", "x").code == 2


def test_retention_of_a_subnet_is_shown_and_set(api: FakeApi, run: Any) -> None:
    """The command states the days and where they come from, sets them, and unsets them."""
    path = "/api/v1/subnet/5/retention"
    api.answers["GET", path] = {"keep_results_days": None, "effective_days": 0}
    assert run("subnet", "retention", "5").out == "jobs are not deleted by age (setting of the platform)\n"
    api.answers["PUT", path] = {"keep_results_days": 30, "effective_days": 30}
    assert run("subnet", "retention", "5", "--set", "30").out.startswith("jobs are deleted 30 days after their end")
    assert json.loads(api.requests[-1].content) == {"keep_results_days": 30}
    run("subnet", "retention", "5", "--unset")
    assert json.loads(api.requests[-1].content) == {"keep_results_days": None}
    assert run("subnet", "retention", "5", "--unset", "--set", "30").code == 2
    assert run("subnet", "retention", "5", "--set", "0").code == 2


def test_deletions_are_listed_with_their_counts(api: FakeApi, run: Any) -> None:
    """Filters are passed on, and counts that are not known yet are shown as such."""
    receipt = {"job_id": 41, "user_id": 7, "subnet_id": 5, "reason": "request", "requested_by": 9}
    receipt |= {"requested_at": "2026-03-14T09:00:00Z", "state": "results", "completed_at": None}
    counts = {"hosts": 254, "rows": 612, "chunks": 4}
    rows = [receipt | {"deleted": dict.fromkeys(counts)}, receipt | {"job_id": 40, "state": "done", "deleted": counts}]
    api.answers["GET", "/api/v1/deletion"] = {"deletions": rows, "total": 2, "page": 1, "page_size": 30}
    ended = run("deletion", "list", "--user", "all", "--state", "open")
    lines = [line.split("\t") for line in ended.out.splitlines()]
    assert [(line[0], line[2], line[4], line[6:]) for line in lines] == [
        ("41", "7", "9", ["results", "-", "-"]),
        ("40", "7", "9", ["done", "254", "612"]),
    ]
    assert {"user_id": "all", "state": "open"}.items() <= dict(api.requests[-1].url.params).items()
    assert run("deletion", "list", "--state", "waiting").code == 2


def entry(number: int, second: float) -> dict[str, Any]:
    received = f"2026-03-14T09:00:{second:06.3f}Z"
    return {
        "id": f"e{number}", "time": received, "received_at": received, "service": "api-gateway", "subject": "7",
        "action": "task.create", "target": f"task {number}", "decision": "allowed", "rule": "", "source": "127.0.0.1",
        "reason": "", "request_id": "c0ffee", "count": 1,
    }  # fmt: skip


class Log:
    """An audit log that records more entries at each time the command sleeps, and ends the command after the last."""

    def __init__(self, api: FakeApi, entries: list[dict[str, Any]], *more: list[dict[str, Any]]) -> None:
        self.entries = entries
        self.between_pages: list[dict[str, Any]] = []
        self._more = list(more)
        api.fault_of = self._page

    def sleep(self, _seconds: float) -> None:
        if not self._more:
            raise KeyboardInterrupt
        self.entries += self._more.pop(0)

    def _page(self, request: httpx2.Request) -> httpx2.Response:
        params = request.url.params
        page, size, since = int(params["page"]), int(params["page_size"]), params.get("since", "")
        found = sorted(
            (each for each in self.entries if each["received_at"] >= since),
            key=lambda each: (each["received_at"], each["id"]),
            reverse=True,
        )
        answer = {"entries": found[(page - 1) * size : page * size], "total": len(found), "page": page}
        self.entries += self.between_pages
        self.between_pages = []
        return httpx2.Response(200, json=answer | {"page_size": size})


def tailed(run: Any, effects: Effects, log: Log, *arguments: str) -> list[str]:
    ended = run("audit", "tail", *arguments, effects=replace(effects, sleep=log.sleep))
    assert ended.code == 130
    return [line.split("\t")[3].removeprefix("task ") for line in ended.out.splitlines()]


def test_tail_of_the_audit_log_prints_more_than_a_page_of_new_entries(api: FakeApi, run: Any, effects: Effects) -> None:
    """Every new entry is printed once and in order, also beyond one page."""
    burst = [entry(number, 10 + number / 1_000) for number in range(250, 500)]
    assert tailed(run, effects, Log(api, [entry(1, 1)], burst)) == ["1", *map(str, range(250, 500))]


def test_tail_of_the_audit_log_prints_each_entry_of_a_shifting_page_once(
    api: FakeApi, run: Any, effects: Effects
) -> None:
    """Entries that are recorded between two pages move others to the next page, and none is printed twice or lost."""
    log = Log(api, [entry(number, number / 1_000) for number in range(100, 250)], [], [])
    log.between_pages = [entry(number, 2) for number in range(500, 507)]
    printed = tailed(run, effects, log, "--limit", "0")
    assert sorted(printed) == sorted([*map(str, range(100, 250)), *map(str, range(500, 507))])


def test_tail_of_the_audit_log_prints_entries_of_equal_and_of_earlier_time(
    api: FakeApi, run: Any, effects: Effects
) -> None:
    """An entry of the same millisecond as the last, or of a moment before it, is printed when it is recorded late."""
    log = Log(api, [entry(100, 5), entry(101, 5)], [entry(102, 5), entry(103, 4.9)], [entry(104, 5)])
    assert tailed(run, effects, log) == ["100", "101", "103", "102", "104"]


def test_tail_of_the_audit_log_begins_with_the_latest_entries(api: FakeApi, run: Any, effects: Effects) -> None:
    """--limit is the number of entries to begin with."""
    log = Log(api, [entry(number, number / 1_000) for number in range(100, 150)], [entry(500, 9)])
    assert tailed(run, effects, log, "--limit", "2") == ["148", "149", "500"]


def test_whoami_prints_the_source_of_the_token(api: FakeApi, run: Any) -> None:
    """The caller is shown with the sources of address and token, and limits by what is used of them."""
    quota = {"limit": 600, "left": 588, "reset": 30}
    limits = {"writes": quota, "at_once": {"limit": 64, "left": 61}}
    api.answers["GET", "/api/v1/me"] = {
        "user_id": 7,
        "admin": False,
        "expires_at": "2026-03-14T21:00:00Z",
        "limits": limits,
    }
    shown = run("whoami").out
    assert shown.startswith(
        "user 7\n  gateway  http://scanfleet.test (SCANFLEET_URL)\n  token    from SCANFLEET_TOKEN,"
    )
    run("context", "add", "lab", "--url", "http://scanfleet.test", "--token-command", f"echo {TOKEN}", environment={})
    shown = run("whoami", environment={"SCANFLEET_URL": "http://scanfleet.test"}).out
    assert '(SCANFLEET_URL)\n  token    from the token_command of context "lab",' in shown
    assert run("limits").out == "writes 12 of 600 a minute · at once 3 of 64\n"


def test_doctor_with_a_failed_check_exits_1(api: FakeApi, run: Any) -> None:
    """Doctor lists each check, and exits 1 if one fails."""
    api.answers["GET", "/api/v1/info"] = {"version": "1", "api": "v1"}
    found = {row["check"]: row["ok"] for row in json.loads(run("doctor", "-o", "json").out)}
    assert found == {"gateway": True, "tls": False, "service": True, "clock": True, "token": True}
    api.fault_of = lambda _request: httpx2.ConnectError("connection refused")
    ended = run("doctor")
    assert ended.code == 1
    assert "connection refused" in ended.out


def test_doctor_on_a_narrow_terminal_shows_the_end_of_the_token(run: Any) -> None:
    """A narrow table truncates the source of the token, which `whoami` prints in full."""
    claims = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + 3_600}).encode()).decode().rstrip("=")
    environment = {"SCANFLEET_URL": "http://scanfleet.test", "SCANFLEET_TOKEN": f"x.{claims}.x"}
    lines = run("doctor", width=60, environment=environment).out.splitlines()
    assert re.search(r"expires in (59:\d\d|1:00:00)", lines[-1])


def test_doctor_checks_the_clock_if_the_token_is_refused(api: FakeApi, run: Any) -> None:
    """A wrong clock is a common cause of a refused token, so the check does not depend on the token."""
    date = {"Date": "Sat, 14 Mar 2026 09:00:00 GMT"}
    api.answers["GET", "/api/v1/info"] = httpx2.Response(200, json={"version": "1", "api": "v1"}, headers=date)
    environment = {"SCANFLEET_URL": "http://scanfleet.test", "SCANFLEET_TOKEN": "stale"}
    for given in (environment, {"SCANFLEET_URL": "http://scanfleet.test"}):
        found = {row["check"]: row["ok"] for row in json.loads(run("doctor", "-o", "json", environment=given).out)}
        assert found == {"gateway": True, "tls": False, "service": True, "clock": False, "token": False}


def test_doctor_checks_the_clock_of_an_older_gateway_with_the_token(api: FakeApi, run: Any) -> None:
    """A gateway without /api/v1/info is compared by an authenticated response."""
    page = {"policies": [], "total": 0, "page": 1, "page_size": 1}
    date = {"Date": "Sat, 14 Mar 2026 09:00:00 GMT"}
    api.answers["GET", "/api/v1/policy"] = httpx2.Response(200, json=page, headers=date)
    found = {row["check"]: row["ok"] for row in json.loads(run("doctor", "-o", "json").out)}
    assert found["clock"] is False


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed(run: Any, shell: str) -> None:
    """Each shell gets a script that asks the command."""
    assert "_SCANFLEET_COMPLETE" in run("completion", shell).out


Complete = Callable[..., list[tuple[str, str | None]]]
HERE = {"SCANFLEET_URL": "http://scanfleet.test", "SCANFLEET_TOKEN": TOKEN}


@pytest.fixture
def complete(effects: Effects, tmp_path: Path) -> Complete:
    """Returns the completions, with their descriptions, of the last of some words."""

    def ask(*words: str, environment: dict[str, str] = HERE, limit: float = 60) -> list[tuple[str, str | None]]:
        session = Session(Config(tmp_path, environment), Output(), replace(effects, completion_seconds=limit))
        completions = ShellComplete(main.cli, {"obj": session}, "scanfleet", COMPLETE)
        found = completions.get_completions(list(words[:-1]), words[-1])
        return [(item.value, item.help) for item in found]

    return ask


def test_objects_are_completed_with_a_description(run: Any, complete: Complete) -> None:
    """A shell completes the latest jobs with state and network, and the names of subnets and policies."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    run("subnet", "create", "two words", "127.9.9.0/24")
    run("policy", "create", "web", "--preset", "quick", "--ports", "80")
    run("job", "submit", "--subnet", "lab", "--policy", "web")
    assert complete("job", "watch", "") == [("41", "pending 0 % 127.9.8.0/24")]
    assert complete("job", "watch", "5") == []
    assert complete("subnet", "show", "") == [("6", "two words 127.9.9.0/24"), ("lab", "127.9.8.0/24")]
    assert complete("scan", "--policy", "w") == [("web", "quick, ports 80")]


def test_descriptions_of_completions_are_escaped(api: FakeApi, run: Any, complete: Complete) -> None:
    """A shell prints a description as it is."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    api.subnets[5]["name"] = "a\x1b[31m b"
    assert complete("subnet", "show", "") == [("5", "a\\x1b[31m b 127.9.8.0/24")]


def test_fields_and_contexts_are_completed(run: Any, complete: Complete) -> None:
    """The fields of --json are completed after a comma too, and contexts have their URLs."""
    run("context", "add", "prod", "--url", "https://scanfleet.example.com", environment={})
    assert complete("context", "use", "", environment={}) == [("prod", "https://scanfleet.example.com")]
    assert complete("job", "show", "--json", "job_id,status.p", environment={}) == [("job_id,status.progress", None)]


def test_completion_without_an_answer_is_empty(run: Any, complete: Complete, tmp_path: Path) -> None:
    """A refused token, an invalid configuration, and a token command that fails give no completions."""
    assert complete("job", "watch", "", environment=HERE | {"SCANFLEET_TOKEN": "stale"}) == []
    run("context", "add", "lab", "--url", "http://scanfleet.test", "--token-command", "false", environment={})
    assert complete("subnet", "show", "", environment={}) == []
    (tmp_path / "config.toml").write_text("current = ")
    assert complete("context", "use", "", environment={}) == []


def test_completion_after_its_timeout_returns_partial_results(api: FakeApi, run: Any, complete: Complete) -> None:
    """Jobs are completed although the networks of their descriptions are not read in time."""
    run("scan", "127.9.8.0/24", "--no-watch")
    answered = threading.Event()

    def fault(request: httpx2.Request) -> None:
        if request.url.path == "/api/v1/subnet":
            answered.wait(60)

    api.fault_of = fault
    assert complete("job", "watch", "", limit=2) == [("41", "pending subnet 5")]
    answered.set()
    for thread in threading.enumerate():
        if thread.name == "completion":
            thread.join()


def test_completion_prints_no_errors(tmp_path: Path) -> None:
    """The command prints nothing on stderr when a shell asks for completions, also not what a token command prints."""
    folder = tmp_path / "scanfleet"
    folder.mkdir()
    (folder / "config.toml").write_text(
        'current = "lab"\n[context.lab]\nurl = "http://127.0.0.1:9"\ntoken_command = ["ls", "/nonexistent"]\n'
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCANFLEET_")}
    environment |= {COMPLETE: "bash_complete", "COMP_WORDS": "scanfleet job show ", "COMP_CWORD": "3"}
    done = subprocess.run(
        [Path(sys.executable).with_name("scanfleet")],
        env=environment | {"XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


RULES = TargetRules((ip_network("127.0.0.0/8"),), (ip_network("127.9.0.0/16"),))
ALLOWED = "  ask the operator who sets SCANFLEET_ALLOWED_NETWORKS\n"
HINTS = {
    "10.0.0.0/8": "  register smaller networks, or ask the operator who sets SCANFLEET_MAX_ADDRESSES\n",
    "10.1.2.0/24": ALLOWED,
    "169.254.0.0/24": "",
    "127.9.8.0/24": "  ask the operator who sets SCANFLEET_DENIED_NETWORKS\n",
    "::ffff:10.1.2.0/120": ALLOWED,
}


@pytest.mark.parametrize("network", HINTS)
@pytest.mark.parametrize("command", ["create", "import", "edit", "scan"])
def test_refusal_by_the_target_rules_has_a_hint(
    api: FakeApi, run: Any, tmp_path: Path, command: str, network: str
) -> None:
    """Every command that sends targets shows the sentence of each target rule unchanged, with its setting and the request id."""
    refusal, hint = RULES.refusal(ip_network(network)), HINTS[network]
    run("subnet", "create", "lab", "127.9.8.0/24")
    (tmp_path / "csv").write_text("name,cidr\nweb,127.9.9.0/24\n")
    arguments = {
        "create": ("subnet", "create", "web", "127.9.9.0/24"),
        "import": ("subnet", "import", tmp_path / "csv"),
        "edit": ("subnet", "edit", "lab", "--cidr", "127.9.9.0/24"),
        "scan": ("scan", "127.9.9.0/24"),
    }
    refused = httpx2.Response(400, json={"error": f"cidr: {refusal}"}, headers={"X-Request-ID": "c0ffee"})
    api.fault_of = lambda request: refused if request.method != "GET" and "/subnet" in request.url.path else None
    ended = run(*arguments[command])
    assert ended.code == 2
    assert f"scanfleet: cidr: {refusal}\n{hint}  request c0ffee\n" in ended.err


@pytest.mark.parametrize("kind", ["subnet", "policy"])
def test_missing_object_has_the_list_as_hint(run: Any, kind: str) -> None:
    """An id that does not exist exits 5 with the command that lists the objects."""
    ended = run(kind, "show", "99")
    assert ended.code == 5
    assert f"scanfleet {kind} list" in ended.err


def test_job_submit_with_an_unknown_policy_has_the_list_as_hint(run: Any) -> None:
    """The unknown policy is named, with the command that lists policies."""
    run("subnet", "create", "lab", "127.9.8.0/24")
    ended = run("job", "submit", "--subnet", "lab", "--policy", "99")
    assert ended.code == 2
    assert "Policy 99 not found\n  it does not exist, or is not yours: scanfleet policy list" in ended.err
