"""Known vulnerabilities of the packages in the locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx2
import semver
from packaging.utils import canonicalize_name
from packaging.version import Version

from supply.locks import LOCKS, PAGE, ROOT, Ecosystem, Package, packages, page_packages

_SECONDS: Final = 300  # timeout for all Python packages; OSV answers each within a second
_SECONDS_PER_PACKAGE: Final = 10

_CANONICAL: Final[Mapping[Ecosystem, Callable[[str], str]]] = {"PyPI": canonicalize_name, "npm": str}
_VERSION: Final[Mapping[Ecosystem, Callable[[str], Any]]] = {  # the result compares with its own kind
    "PyPI": Version,
    "npm": partial(semver.Version.parse, optional_minor_and_patch=True),  # OSV writes "0" for the first version
}


class NotAuditedError(Exception):
    """The advisories cannot be read; the message has the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A vulnerability of a package.

    Attributes:
        fixed: versions without it; empty when there is none yet.
        locks: the locks that pin the package.
    """

    package: Package
    advisory: str
    fixed: tuple[str, ...]
    locks: tuple[str, ...]

    def __str__(self) -> str:
        mend = f"fixed in {', '.join(self.fixed)}" if self.fixed else "not fixed in any release"
        return f"{self.package.name} {self.package.version}: {self.advisory}, {mend} (locks: {', '.join(self.locks)})"


def audit(ecosystem: Ecosystem, advisories: Path | None) -> tuple[list[Finding], int]:
    """Return the findings and the number of audited packages of an ecosystem, for all platforms.

    Args:
        ecosystem: whose packages are audited.
        advisories: the ecosystem's advisories in OSV's format, a zip file with a JSON document for each. Without it,
            OSV is queried.

    Raises:
        NotAuditedError: the file or OSV cannot be read.
    """
    locked = (
        {PAGE: page_packages()} if ecosystem == "npm" else {lock: packages(lock, environment=None) for lock in LOCKS}
    )
    pinned: defaultdict[Package, list[str]] = defaultdict(list)
    for lock, each in locked.items():
        for package in each:
            pinned[package].append(lock)
    if advisories is None and ecosystem == "PyPI":
        found: Iterable[_Found] = _of_pip_audit()
    else:
        documents = _of_osv(pinned) if advisories is None else _of_file(advisories, ecosystem)
        found = _matches(documents, pinned, ecosystem)
    findings = [Finding(package, advisory, fixed, tuple(pinned[package])) for package, advisory, fixed in found]
    return findings, len(pinned)


_Found = tuple[Package, str, tuple[str, ...]]
_Document = Mapping[str, Any]  # an advisory in OSV's format


def _of_pip_audit() -> list[_Found]:
    locks = [part for lock in LOCKS for part in ("-r", f"requirements/{lock}.txt")]
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
    try:
        run = subprocess.run(
            [*command, "--vulnerability-service", "osv", "--format", "json", *locks],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        audited = json.loads(run.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise NotAuditedError(
            "pip-audit got no answer from OSV. On a machine that cannot reach it, give its export of PyPI's advisories: "
            "make audit ADVISORIES=all.zip",
        ) from error
    if skipped := [each["name"] for each in audited if "skip_reason" in each]:
        raise NotAuditedError(f"pip-audit has skipped {len(skipped)} packages: {', '.join(skipped[:5])}")
    return [
        (Package(each["name"], each["version"]), finding["id"], tuple(finding["fix_versions"]))
        for each in audited
        for finding in each["vulns"]
    ]


def _of_osv(pinned: Iterable[Package]) -> Collection[_Document]:
    url = os.environ.get("PIP_AUDIT_OSV_URL", "https://api.osv.dev/v1/query")
    documents: dict[str, _Document] = {}
    try:
        with httpx2.Client(timeout=_SECONDS_PER_PACKAGE) as client:
            for package in pinned:
                asked = {"name": package.name, "ecosystem": package.ecosystem}
                answer = client.post(url, json={"package": asked, "version": package.version}).raise_for_status().json()
                if "next_page_token" in answer:
                    raise NotAuditedError(f"OSV returned only the first page of the advisories for {package.name}")
                documents |= {document["id"]: document for document in answer.get("vulns", ())}
    except (httpx2.HTTPError, ValueError) as error:
        raise NotAuditedError(
            "there was no answer from OSV. On a machine that cannot reach it, give its export of npm's advisories: "
            "make audit NPM_ADVISORIES=npm.zip",
        ) from error
    return documents.values()


def _of_file(advisories: Path, ecosystem: Ecosystem) -> Collection[_Document]:
    try:
        with zipfile.ZipFile(advisories) as archive:
            documents = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise NotAuditedError(f"{advisories} cannot be read as a zip file of advisories: {error}") from error
    if not any(_concerns(affected, ecosystem) for document in documents for affected in document.get("affected", ())):
        raise NotAuditedError(f"{advisories} holds no advisory of {ecosystem}")
    return documents


def _matches(documents: Iterable[_Document], pinned: Iterable[Package], ecosystem: Ecosystem) -> Iterator[_Found]:
    canonical = _CANONICAL[ecosystem]
    by_name = defaultdict(list)
    for package in pinned:
        by_name[canonical(package.name)].append(package)
    for document in documents:
        if "withdrawn" in document:
            continue
        for affected in document.get("affected", ()):
            # An advisory may name packages of several ecosystems, whatever export it is in.
            for package in by_name[canonical(affected["package"]["name"])] if _concerns(affected, ecosystem) else ():
                if _affects(affected, package):
                    yield package, document["id"], _fixed(affected, package)


def _concerns(affected: Mapping[str, Any], ecosystem: Ecosystem) -> bool:
    return bool(affected.get("package", {}).get("ecosystem") == ecosystem)


def _affects(affected: Mapping[str, Any], package: Package) -> bool:
    if package.version in affected.get("versions", ()):
        return True
    version = _VERSION[package.ecosystem](package.version)
    affected_now = False
    for kind, since in _events(affected, package.ecosystem):
        if kind == "introduced" and since <= version:
            affected_now = True
        elif (kind == "fixed" and since <= version) or (kind == "last_affected" and since < version):
            affected_now = False
    return affected_now


def _fixed(affected: Mapping[str, Any], package: Package) -> tuple[str, ...]:
    version = _VERSION[package.ecosystem](package.version)
    events = _events(affected, package.ecosystem)
    return tuple(str(since) for kind, since in events if kind == "fixed" and since > version)


def _events(affected: Mapping[str, Any], ecosystem: Ecosystem) -> list[tuple[str, Any]]:
    """Return the events of the package in the order of its versions."""
    events = []
    for span in affected.get("ranges", ()):
        for event in span.get("events", ()) if span.get("type") != "GIT" else ():
            for kind, since in event.items():
                try:
                    events.append((kind, _VERSION[ecosystem](since)))
                except ValueError:
                    continue  # old advisories contain invalid versions
    return sorted(events, key=lambda event: event[1])
