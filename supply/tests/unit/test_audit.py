"""Which vulnerabilities are found, and what happens where no advisories can be read."""

from __future__ import annotations

import json
import re
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
from supply.locks import LOCKS, ROOT, Ecosystem, Package, packages, page_packages

PINNED = {package.name: package.version for lock in LOCKS for package in packages(lock, environment=None)}
PREACT = next(package for package in page_packages() if package.name == "preact")


def advisory(name: str = "starlette", ecosystem: Ecosystem = "PyPI", **affected: Any) -> dict[str, Any]:
    return {"id": "GHSA-1", "affected": [{"package": {"ecosystem": ecosystem, "name": name}, **affected}]}


def since(*events: Mapping[str, str], kind: str = "ECOSYSTEM") -> dict[str, Any]:
    return {"ranges": [{"type": kind, "events": list(events)}]}


def archive(folder: Path, *documents: Mapping[str, Any]) -> Path:
    file = folder / "all.zip"
    with zipfile.ZipFile(file, "w") as made:
        for number, document in enumerate(documents):
            made.writestr(f"{number}.json", json.dumps(document))
    return file


def test_audit_reads_every_lock() -> None:
    """Each lock of Python packages is audited, also those of the tools."""
    assert set(LOCKS) == {path.stem for path in (ROOT / "requirements").glob("*.txt")}


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
    findings, audited = audit("PyPI", archive(tmp_path, advisory(**affected)))
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
def test_audit_ignores_advisories_without_effect_on_the_pins(tmp_path: Path, document: dict[str, Any]) -> None:
    """Other packages, other versions and withdrawn advisories are no findings."""
    assert audit("PyPI", archive(tmp_path, document))[0] == []


@pytest.mark.parametrize(
    ("events", "fixed"),
    [
        (({"introduced": "0"}, {"fixed": "9999.0.0-beta.1"}), [("9999.0.0-beta.1",)]),
        (({"introduced": f"{PREACT.version}-experimental.2"},), [()]),
        (({"introduced": "0"}, {"fixed": f"{PREACT.version}-rc.1"}), []),
        (({"introduced": "0"}, {"last_affected": f"{PREACT.version}-rc.1"}), []),
    ],
)
def test_audit_orders_npm_versions_by_their_own_rules(
    tmp_path: Path, events: tuple[Mapping[str, str], ...], fixed: list[tuple[str, ...]]
) -> None:
    """A range of npm's advisories is one of semantic versions, with pre-releases before their release."""
    findings, audited = audit("npm", archive(tmp_path, advisory("preact", "npm", **since(*events, kind="SEMVER"))))
    assert findings == [Finding(PREACT, "GHSA-1", each, ("page",)) for each in fixed]
    assert audited == len(page_packages())


def test_audit_passes_over_the_same_name_in_the_other_ecosystem(tmp_path: Path) -> None:
    """An advisory matches packages of its own ecosystem only, even if it names both ecosystems."""
    everything = since({"introduced": "0"})
    affected = [
        advisory("starlette", "npm", **everything),
        advisory("preact", "PyPI", **everything),
        advisory("not-pinned", "PyPI"),
        advisory("not-pinned", "npm"),
    ]
    export = archive(tmp_path, {"id": "GHSA-1", "affected": [part for each in affected for part in each["affected"]]})
    assert audit("PyPI", export)[0] == []
    assert audit("npm", export)[0] == []


def test_audit_of_an_unreadable_or_empty_export_is_no_audit(tmp_path: Path) -> None:
    """A file that is missing, no archive, or without advisories of the ecosystem never counts as 'nothing found'."""
    (tmp_path / "text.zip").write_text("no archive")
    for file in (tmp_path / "missing.zip", tmp_path / "text.zip", archive(tmp_path)):
        with pytest.raises(NotAuditedError):
            audit("PyPI", file)
    with pytest.raises(NotAuditedError, match="holds no advisory of npm"):
        audit("npm", archive(tmp_path, advisory()))


def command(pypi: Path, npm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    exports = ["--advisories", str(pypi), "--npm-advisories", str(npm)]
    line = [sys.executable, "-m", "supply", "audit", *exports, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


def test_command_fails_on_a_finding_that_a_release_fixes(tmp_path: Path) -> None:
    """The exit status is 1 for a fixable finding, and 0 with a report for one that nothing fixes yet."""
    everything = [advisory(ecosystem="PyPI"), advisory("preact", "npm")]
    affected: list[tuple[str, Ecosystem]] = [("starlette", "PyPI"), ("preact", "npm")]
    for name, ecosystem in affected:
        found = advisory(name, ecosystem, **since({"introduced": "0"}, {"fixed": "9999.0.0"}))
        export = archive(tmp_path, *everything, found)
        fixable = command(export, export)
        assert fixable.returncode == 1
        assert re.search(rf"^{name} .*: GHSA-1, fixed in 9999.0.0", fixable.stdout, re.MULTILINE)
        export = archive(tmp_path, *everything, advisory(name, ecosystem, **since({"introduced": "0"})))
        other = command(export, export)
        assert other.returncode == 0
        assert re.search(rf"^{name} .*: GHSA-1, not fixed in any release", other.stdout, re.MULTILINE)


def test_command_without_advisories_reports_a_missing_audit(tmp_path: Path) -> None:
    """Without advisories of an ecosystem the command reports it, and fails only where they are required."""
    export = archive(tmp_path, advisory())
    for required, status in (((), 0), (("--required",), 1)):
        run = command(export, tmp_path / "missing.zip", *required)
        assert run.returncode == status
        assert run.stderr.startswith("NOT AUDITED: npm packages: ")
        assert re.fullmatch(r"\d+ PyPI packages audited, 0 findings\n", run.stdout)


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


@pytest.mark.parametrize(("ecosystem", "name"), [("PyPI", "starlette"), ("npm", "preact")])
def test_audit_asks_osv_about_every_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ecosystem: Ecosystem, name: str
) -> None:
    """Without an export OSV is asked, and its findings become ours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    affected = since({"introduced": "0"}, {"fixed": "9999.0.0"})
    found = advisory(name, ecosystem, **affected) | {"summary": "x", "details": "x"}
    with osv({name: {"vulns": [found]}}) as url:
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", url)
        findings, _ = audit(ecosystem, None)
    assert [(each.package.name, each.advisory, each.fixed) for each in findings] == [(name, "GHSA-1", ("9999.0.0",))]


@pytest.mark.parametrize("ecosystem", ["PyPI", "npm"])
def test_audit_of_an_osv_that_fails_is_no_audit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ecosystem: Ecosystem
) -> None:
    """An error of OSV's is never 'nothing found'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with osv(None) as url:
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", url)
        with pytest.raises(NotAuditedError, match="no answer from OSV"):
            audit(ecosystem, None)


def test_audit_of_an_incomplete_answer_is_no_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of OSV's that continues on another page is never 'nothing found'."""
    with osv({"preact": {"next_page_token": "2"}}) as url:
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", url)
        with pytest.raises(NotAuditedError, match="first page of the advisories for preact"):
            audit("npm", None)
