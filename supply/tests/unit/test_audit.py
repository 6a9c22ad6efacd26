"""Which vulnerabilities are found, and what happens where no advisories can be read."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from supply.audit import Finding, NotAuditedError, audit
from supply.locks import LOCKS, ROOT, Package, packages

PINNED = {package.name: package.version for lock in LOCKS for package in packages(lock, environment=None)}


def advisory(name: str = "starlette", **affected: Any) -> dict[str, Any]:
    return {"id": "GHSA-1", "affected": [{"package": {"ecosystem": "PyPI", "name": name}, **affected}]}


def since(*events: Mapping[str, str]) -> dict[str, Any]:
    return {"ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}


def archive(folder: Path, *documents: Mapping[str, Any]) -> Path:
    file = folder / "all.zip"
    with zipfile.ZipFile(file, "w") as made:
        for number, document in enumerate(documents):
            made.writestr(f"{number}.json", json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("affected", "fixed"),
    [
        ({"versions": [PINNED["starlette"]]}, ()),
        (since({"introduced": "0"}), ()),
        (since({"introduced": "0"}, {"fixed": "9999"}), ("9999",)),
        (since({"introduced": PINNED["starlette"]}, {"fixed": "9999"}), ("9999",)),
        (since({"introduced": "0"}, {"last_affected": PINNED["starlette"]}), ()),
    ],
)
def test_audit_finds_a_pinned_version_that_is_affected(
    tmp_path: Path, affected: dict[str, Any], fixed: tuple[str, ...]
) -> None:
    """A version that is listed, or within a range, is a finding that names the locks and the versions that mend it."""
    findings, audited = audit(archive(tmp_path, advisory(**affected)))
    locks = tuple(lock for lock in LOCKS if any(each.name == "starlette" for each in packages(lock)))
    assert findings == [Finding(Package("starlette", PINNED["starlette"]), "GHSA-1", fixed, locks)]
    assert audited > len(PINNED) - 1


@pytest.mark.parametrize(
    "document",
    [
        advisory(versions=["0.0.1"]),
        advisory(**since({"introduced": "9999"})),
        advisory(**since({"introduced": "0"}, {"fixed": PINNED["starlette"]})),
        advisory(**since({"introduced": "0"}, {"last_affected": "0.0.1"})),
        advisory(**since({"introduced": "0"}, {"fixed": "0.1"}, {"introduced": "9999"})),
        advisory(**since({"introduced": "not a version"})),
        advisory("not-pinned", **since({"introduced": "0"})),
        advisory(**since({"introduced": "0"})) | {"withdrawn": "2026-01-01T00:00:00Z"},
    ],
)
def test_audit_passes_over_what_does_not_affect_the_pins(tmp_path: Path, document: dict[str, Any]) -> None:
    """Other packages, other versions and withdrawn advisories are no findings."""
    assert audit(archive(tmp_path, document))[0] == []


def test_audit_of_an_unreadable_or_empty_export_is_no_audit(tmp_path: Path) -> None:
    """A file that is missing, no archive, or without advisories never counts as 'nothing found'."""
    (tmp_path / "text.zip").write_text("no archive")
    for file in (tmp_path / "missing.zip", tmp_path / "text.zip", archive(tmp_path)):
        with pytest.raises(NotAuditedError):
            audit(file)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "supply", "audit", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


def test_command_fails_on_a_finding_that_a_release_fixes(tmp_path: Path) -> None:
    """The exit status is 1 for a fixable finding, and 0 with a report for one that nothing fixes yet."""
    fixable = command("--advisories", archive(tmp_path, advisory(**since({"introduced": "0"}, {"fixed": "9999"}))))
    assert fixable.returncode == 1
    assert "GHSA-1, fixed in 9999" in fixable.stdout
    other = command("--advisories", archive(tmp_path, advisory(**since({"introduced": "0"}))))
    assert other.returncode == 0
    assert "GHSA-1, not fixed in any release" in other.stdout


def test_command_says_that_nothing_was_audited(tmp_path: Path) -> None:
    """Without advisories the command says so, and fails only where they are required."""
    for required, status in (((), 0), (("--required",), 1)):
        run = command("--advisories", tmp_path / "missing.zip", *required)
        assert (run.returncode, run.stdout) == (status, "")
        assert run.stderr.startswith("NOT AUDITED: ")


@contextmanager
def osv(answers: Mapping[str, Any] | None) -> Iterator[str]:
    """A service that answers as OSV does, by package; without answers it is broken."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps((answers or {}).get(query["package"]["name"], {})).encode()
            self.send_response(500 if answers is None else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_audit_asks_osv_about_every_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without an export pip-audit asks OSV, and its findings become ours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = advisory(**since({"introduced": "0"}, {"fixed": "9999"})) | {"summary": "x", "details": "x"}
    with osv({"starlette": {"vulns": [found]}}) as url:
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", url)
        findings, _ = audit(None)
    assert [(each.package.name, each.advisory, each.fixed) for each in findings] == [("starlette", "GHSA-1", ("9999",))]


def test_audit_of_an_osv_that_fails_is_no_audit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error of OSV's is never 'nothing found'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with osv(None) as url:
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", url)
        with pytest.raises(NotAuditedError, match="no answer from OSV"):
            audit(None)
