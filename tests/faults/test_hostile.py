"""Forged messages, and servers with hostile banners."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4
from xml.etree import ElementTree as ET

import pytest

from local.paths import SCANFLEET
from local.wait import until
from scanfleet.contracts.messages import (
    CancelJob,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    CommandRejected,
    HostScanned,
    Message,
    PortFound,
    ScanChunk,
    StopChunk,
    SubmitJobs,
    WorkerReady,
)
from scanfleet.contracts.messages.envelope import encode
from scanfleet.contracts.messages.topics import (
    SCAN_COMMANDS,
    SCAN_PROGRESS,
    SCAN_REPLIES,
    SCAN_RESULTS,
    SCAN_TASKS,
    SCAN_WORKERS,
    Topic,
)
from scanfleet.scanning.policy import Preset, fill_in
from tests.faults.documents import Document
from tests.faults.invariants import Invariants
from tests.faults.kit import ENDLESS, LIMIT_SECONDS, TINY, Caller, Platform, caught

pytestmark = pytest.mark.e2e


def forge(platform: Platform, topic: Topic, *messages: Message, key: bytes | None = None) -> None:
    """Send messages that look exactly like genuine ones."""
    made = [encode(topic, message, source="forger") for message in messages]
    platform.topics.send([(topic.name, None, key or each.key, each.value, each.headers) for each in made])


def running(platform: Platform, job_id: int) -> Document:
    """A chunk of the job that a worker has claimed."""
    return caught(
        lambda: next(iter(chunk for chunk in platform.documents.chunks(job_id) if chunk["state"] == "running"), None),
        LIMIT_SECONDS,
        "a chunk to run",
    )


@pytest.mark.proves("A13", "G13")
def test_forged_commands_are_rejected(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Commands that refer to objects of another user are rejected without effect."""
    subnet, policy = user.subnet(platform.network(24)), user.policy(**ENDLESS)
    (job,) = user.submit([subnet], policy)
    running(platform, job["id"])
    cancel = CancelJob(command_id=uuid4().hex, user_id=1, job_id=job["id"])
    submit = SubmitJobs(command_id=uuid4().hex, user_id=1, policy_id=policy, subnet_ids=(subnet,))
    forge(platform, SCAN_COMMANDS, cancel, submit)

    def rejections() -> dict[str, int]:
        replies = [each.message for each in platform.topics.messages(SCAN_REPLIES, CommandRejected)]
        return {each.command_id: each.status for each in replies if isinstance(each, CommandRejected)}

    until(lambda: {cancel.command_id, submit.command_id} <= rejections().keys(), LIMIT_SECONDS, "both to be refused")
    assert (rejections()[cancel.command_id], rejections()[submit.command_id]) == (404, 400)
    assert user.status(job["id"]) == "running"
    user.cancel(job["id"])
    invariants.check()


@pytest.mark.proves("A13", "G5", "G6")
def test_forged_reports_are_ignored(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Reports with a stale attempt or of an unknown worker are ignored, counted and answered with a stop."""
    job_id = user.scan(platform.network(24), **ENDLESS)
    chunk = running(platform, job_id)
    stale = platform.metric("job-orchestrator", "scanfleet_stale_reports_total")
    token: dict[str, Any] = {"job_id": job_id, "chunk_id": chunk["_id"], "attempt": chunk["attempt"]}
    done = "s" * len(chunk["outcomes"])
    end = {"outcomes": done, "first_address": chunk["first_address"], "slot_seconds": 1.0, "technique": "connect"}
    forge(
        platform,
        SCAN_PROGRESS,
        ChunkScanned(**(token | {"attempt": chunk["attempt"] + 1}), worker_id=chunk["worker_id"], **end),
        ChunkScanned(**token, worker_id="unknown", **end),
        ChunkProgressed(**token, worker_id="unknown", outcomes=done),
    )
    until(
        lambda: platform.metric("job-orchestrator", "scanfleet_stale_reports_total") >= stale + 3,
        LIMIT_SECONDS,
        "all three to be counted as stale",
    )
    stops = [each.message for each in platform.topics.messages(SCAN_TASKS, StopChunk)]
    assert any(isinstance(stop, StopChunk) and stop.worker_id == "unknown" for stop in stops)
    (now,) = [each for each in platform.documents.chunks(job_id) if each["_id"] == chunk["_id"]]
    assert (now["state"], now["attempt"], now["outcomes"]) == ("running", chunk["attempt"], chunk["outcomes"])
    letters = len(platform.topics.records(SCAN_PROGRESS, letters=True))
    forge(platform, SCAN_PROGRESS, ChunkProgressed(**token, worker_id="unknown", outcomes=done), key=b"elsewhere")
    until(
        lambda: len(platform.topics.records(SCAN_PROGRESS, letters=True)) == letters + 1, LIMIT_SECONDS, "a dead letter"
    )
    user.cancel(job_id)
    invariants.check()


def forgeries(host: HostScanned, end: ChunkScanned, others: HostScanned) -> list[Message]:
    """Return messages that a compromised worker can forge from its own host and end and from a host of another chunk."""
    grant, backdoor = host.grant, (PortFound(port=4444, service="backdoor"),)
    assert grant is not None
    elsewhere = str(ip_address(grant.first_address) + grant.addresses)
    all_down = "d" * len(end.outcomes)
    hosts: list[dict[str, Any]] = [
        {"grant": None, "address": elsewhere},
        {"address": elsewhere},
        {"address": elsewhere, "chunk_id": f"{host.job_id}-made-up"},
        {"address": elsewhere, "grant": grant.model_copy(update={"addresses": 1_024})},
        {"job_id": others.job_id, "chunk_id": others.chunk_id, "user_id": others.user_id, "address": elsewhere},
        {"job_id": others.job_id, "user_id": others.user_id},
        {"user_id": others.user_id},
        {"attempt": host.attempt + 1},
        {"ports": backdoor},
        {"ports": backdoor, "grant": grant.model_copy(update={"ports": "4444"})},
    ]
    ends: list[dict[str, Any]] = [
        {"grant": None, "outcomes": all_down},
        {"job_id": others.job_id, "chunk_id": others.chunk_id, "outcomes": all_down},
        {"attempt": end.attempt + 1, "outcomes": all_down},
        {"first_address": elsewhere},
        {"outcomes": "d"},
    ]
    return [
        *(host.model_copy(update=changed) for changed in hosts),
        *(end.model_copy(update=changed) for changed in ends),
    ]


@pytest.mark.proves("A25", "G19")
def test_forged_and_replayed_results_have_no_effect(platform: Platform, user: Caller, invariants: Invariants) -> None:
    """Results without a valid signature, replays, and infinite slot seconds do not change results, ledger and accounts."""
    with platform.listeners():
        job_id = user.scan(platform.network(24), **TINY)
        assert user.finished(job_id)["status"]["status"] == "completed"
        other = platform.caller()
        others_id = other.scan(platform.network(25), **TINY)
        assert other.finished(others_id)["status"]["status"] == "completed"
    messages = [each.message for each in platform.topics.messages(SCAN_RESULTS, HostScanned, ChunkScanned)]
    mine = [each for each in messages if isinstance(each, HostScanned | ChunkScanned) and each.job_id == job_id]
    host = next(each for each in mine if isinstance(each, HostScanned) and each.ports)
    end = next(each for each in mine if isinstance(each, ChunkScanned) and each.chunk_id == host.chunk_id)
    theirs = next(each for each in messages if isinstance(each, HostScanned) and each.job_id == others_id)

    def effects() -> list[Any]:
        clocks = platform.documents.client["scanfleet_job_orchestrator"]["clocks"].find()
        times = {each["_id"]: each["time"] for each in clocks}  # whether a user is active changes by itself
        documents = [
            platform.documents.jobs(),
            platform.documents.chunks(job_id),
            platform.documents.chunks(others_id),
            platform.documents.closed(),
        ]
        hosts = sorted(each["_id"] for each in platform.documents.hosts())
        return [*documents, hosts, times, user.results(job_id), other.results(others_id)]

    until(
        lambda: not any(job.get("outbox") for job in platform.documents.jobs()),
        LIMIT_SECONDS,
        "published events to leave the outboxes",
    )
    before, dropped = effects(), platform.metric("result-store", "scanfleet_results_uncovered_total")
    forged = forgeries(host, end, theirs)
    forge(platform, SCAN_RESULTS, *forged)
    # Valid signatures, but of a chunk that is closed.
    late = host.model_copy(update={"ports": (), "outcome": "s"})
    forge(platform, SCAN_RESULTS, late, end.model_copy(update={"outcomes": "d" * len(end.outcomes)}), *mine)
    chunk = platform.documents.chunks(job_id)[0]
    token = {"job_id": job_id, "chunk_id": chunk["_id"], "attempt": chunk["attempt"], "worker_id": chunk["worker_id"]}
    released = ChunkReleased(**token, outcomes=chunk["outcomes"], reason="", slot_seconds=123_456_789)
    made = encode(SCAN_PROGRESS, released, source="forger")
    letters = len(platform.topics.records(SCAN_PROGRESS, letters=True))
    infinite = made.value.replace(b"123456789.0", b"1e999")
    assert infinite != made.value
    platform.topics.send(
        [(SCAN_PROGRESS.name, None, made.key, value, made.headers) for value in (made.value, infinite)]
    )
    platform.topics.until_read()
    assert effects() == before
    assert platform.metric("result-store", "scanfleet_results_uncovered_total") == dropped + len(forged)
    assert len(platform.topics.records(SCAN_PROGRESS, letters=True)) == letters + 1
    other.close()
    invariants.check()


@pytest.mark.proves("A13", "G12", "G15")
def test_forged_task_is_refused_and_audited(platform: Platform, invariants: Invariants) -> None:
    """A worker that gets a task for denied addresses starts no nmap, and reports the refusal to job and audit log."""
    last = max(
        platform.topics.messages(SCAN_WORKERS, WorkerReady), key=lambda published: published.record.timestamp
    ).message
    assert isinstance(last, WorkerReady)
    task = ScanChunk(
        job_id=999_999_999,
        chunk_id="999999999-0",
        attempt=1,
        worker_id=last.worker_id,
        user_id=1,
        first_address=f"{platform.net}.66.1",
        outcomes="....",
        policy=fill_in(Preset.QUICK, dict(ENDLESS)),
        ports="1-1000",
        lease_seconds=30,
        estimate_seconds=1,
    )
    forge(platform, SCAN_TASKS, task)

    def answers() -> list[ChunkScanned]:
        messages = [each.message for each in platform.topics.messages(SCAN_PROGRESS, ChunkScanned)]
        return [each for each in messages if isinstance(each, ChunkScanned) and each.job_id == task.job_id]

    seen: set[str] = set()

    def answered() -> bool:
        seen.update(platform.nmaps().values())
        return bool(answers())

    until(answered, LIMIT_SECONDS, "the worker to refuse")
    (answer,) = answers()
    assert answer.outcomes == "rrrr"
    assert answer.reason
    assert not seen
    admin = platform.caller(token=platform.token(2, roles=["admin"]))

    def audited() -> list[Document]:
        found = admin.http.get("/api/v1/audit", params={"subject": "1"}).json()["entries"]
        return [entry for entry in found if task.chunk_id in entry["target"]]

    until(lambda: bool(audited()), LIMIT_SECONDS, "the refusal to be in the audit log")
    (entry,) = audited()
    assert (entry["service"], entry["decision"], entry["rule"]) == ("scanner-worker", "refused", "targets")
    assert f"{platform.net}.66.0/24" in entry["target"]
    admin.close()
    invariants.check()


@contextmanager
def banner_server(place: tuple[str, int], words: bytes) -> Iterator[None]:
    """Run a server that sends `words` to every client and closes the connection."""
    with socket.create_server(place) as listener:

        def serve() -> None:
            with suppress(OSError):  # the server was closed
                while True:
                    with listener.accept()[0] as caller, suppress(OSError):
                        caller.sendall(words)
                        caller.settimeout(2)
                        while caller.recv(1024):
                            pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def printed(user: Caller, folder: Path, *arguments: str) -> str:
    """Return what `scanfleet ARGUMENTS` prints, on both streams."""
    environment = {
        "PATH": os.environ["PATH"],
        "SCANFLEET_URL": str(user.http.base_url),
        "SCANFLEET_TOKEN": user.http.headers["Authorization"].removeprefix("Bearer "),
        "XDG_CONFIG_HOME": str(folder),
    }
    ended = subprocess.run(
        [SCANFLEET, *arguments], env=environment, capture_output=True, check=False, timeout=LIMIT_SECONDS
    )
    return (ended.stdout + ended.stderr).decode()


def unprintable(text: str) -> list[str]:
    """Return the characters that act on a terminal; separators of lines and cells do not count."""
    return [letter for letter in text if not letter.isprintable() and letter not in "\r\n\t"]


@pytest.mark.proves("A29")
def test_hostile_names_and_errors_are_printable(platform: Platform, user: Caller, tmp_path: Path) -> None:
    """Escapes, C1 and direction characters in names, paths, filters and errors are ASCII in JSON and printable in the command."""
    hostile = "x\x9b31m\u202ey\u2066\x85z"
    user.http.post("/api/v1/subnet", json={"name": hostile, "cidr": platform.network(30)})
    user.http.post("/api/v1/policy", json={"name": hostile} | dict(TINY))
    asked = {
        "GET": ("subnet", "policy", "task", f"task/{quote(hostile)}", f"task?status={quote(hostile)}", quote(hostile)),
        "POST": ("subnet", "policy", "task", "task/cancel", "task/estimate"),
    }
    for method, paths in asked.items():
        for path in paths:
            body = {hostile: hostile, "name": hostile, "cidr": hostile} if method == "POST" else None
            answer = user.http.request(method, f"/api/v1/{path}", json=body)
            assert answer.is_success is (method == "GET" and path in ("subnet", "policy", "task")), path
            assert answer.content.isascii(), path
            assert not unprintable(answer.text), path
    for arguments in (
        ["subnet", "list"],
        ["policy", "list", "-o", "wide"],
        ["subnet", "show", hostile],
    ):
        text = printed(user, tmp_path, *arguments)
        assert "31m" in text, arguments
        assert not unprintable(text), arguments


@pytest.mark.proves("A15", "A29", "G16")
def test_hostile_banner_is_escaped(platform: Platform, user: Caller, invariants: Invariants, tmp_path: Path) -> None:
    """A banner with markup, terminal escapes and direction marks is plain text in all formats of results and hosts."""
    words = "SSH-2.0-<script>alert(1)</script> \x1b]0;owned\x07\x1b[31m \u202eexe.txt \x00\r\n".encode()
    name = "220 <b>\x1b[31m\u202e ESMTP Postfix (Debian)\r\n".encode()  # which nmap reports as the name of the host
    with banner_server((f"{platform.net}.8.1", 8022), words), banner_server((f"{platform.net}.8.1", 8025), name):
        job_id = user.scan(
            platform.network(30),
            **{**TINY, "ports": "8022,8025", "service_detection": True, "scripts": ["banner"]},
        )
        assert user.finished(job_id)["status"]["status"] == "completed"
    answers = {
        kind: user.http.get(f"/api/v1/task/{job_id}/results", headers={"Accept": kind})
        for kind in ("application/json", "application/x-ndjson", "text/csv")
    }
    for kind, answer in answers.items():
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "<script>alert(1)" in answer.text.replace("&lt;", "<").replace("\\u003c", "<")
        assert not [letter for letter in answer.text if not letter.isprintable() and letter not in "\r\n"]
    assert answers["application/json"].content.isascii()
    (result, _) = json.loads(answers["application/json"].content)
    assert "\x1b" not in "".join(map(str, result.values()))
    assert "\u202e" not in "".join(map(str, result.values()))
    assert "script" in result["banner"]
    listed = user.http.get(f"/api/v1/task/{job_id}/hosts")
    assert listed.headers["x-content-type-options"] == "nosniff"
    assert listed.text.isascii()
    assert listed.text.isprintable()
    (found,) = [host for host in listed.json() if host["ports"]]
    (of_host,) = found["hostnames"]
    assert "<b>" in of_host
    assert of_host.isprintable()
    assert (found["outcome"], found["port_count"]) == ("answered", 2)
    assert found["reason"]
    export = user.http.get(f"/api/v1/task/{job_id}/nmap.xml")
    assert export.headers["content-disposition"] == f'attachment; filename="scanfleet-job-{job_id}.xml"'
    assert export.headers["x-content-type-options"] == "nosniff"
    assert export.text.isascii()
    assert export.text.replace("\n", "").isprintable()
    root = ET.fromstring(export.text)  # noqa: S314 # written by result-store
    (service,) = root.findall("host/ports/port[@portid='8025']/state[@state='open']/../service")
    assert "<b>" in service.attrib["hostname"]
    assert [each.get("exit") for each in root.iter("finished")] == ["success"]
    assert len(root.findall("host")) == 4
    for kind in ("results", "hosts"):
        for form in ("table", "wide", "csv", "jsonl"):
            text = printed(user, tmp_path, "job", kind, str(job_id), "-o", form)
            assert "8022" in text
            assert not unprintable(text), (kind, form)
    invariants.check()
