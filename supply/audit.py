"""Known vulnerabilities of the packages in the locks."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from supply.locks import LOCKS, ROOT, Package, packages

_SECONDS: Final = 300  # timeout for all packages; OSV answers each within a second


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


def audit(advisories: Path | None) -> tuple[list[Finding], int]:
    """Return the findings and the number of audited packages, for all platforms.

    Args:
        advisories: PyPI's advisories in OSV's format, a zip file with a JSON document for each. Without it, pip-audit
            queries OSV.

    Raises:
        NotAuditedError: the file or OSV cannot be read.
    """
    pinned: defaultdict[Package, list[str]] = defaultdict(list)
    for lock in LOCKS:
        for package in packages(lock, environment=None):
            pinned[package].append(lock)
    found = _of_osv() if advisories is None else _of_file(advisories, pinned)
    return [Finding(package, advisory, fixed, tuple(pinned[package])) for package, advisory, fixed in found], len(
        pinned
    )


_Found = tuple[Package, str, tuple[str, ...]]


def _of_osv() -> list[_Found]:
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


def _of_file(advisories: Path, pinned: Iterable[Package]) -> Iterator[_Found]:
    by_name = defaultdict(list)
    for package in pinned:
        by_name[canonicalize_name(package.name)].append(package)
    try:
        with zipfile.ZipFile(advisories) as archive:
            documents = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise NotAuditedError(f"{advisories} cannot be read as a zip file of advisories: {error}") from error
    if not documents:
        raise NotAuditedError(f"{advisories} holds no advisory")
    for document in documents:
        if "withdrawn" in document:
            continue
        for affected in document.get("affected", ()):
            for package in by_name[canonicalize_name(affected.get("package", {}).get("name", ""))]:
                if _affects(affected, package.version):
                    yield package, document["id"], _fixed(affected, package.version)


def _affects(affected: Mapping[str, Any], version: str) -> bool:
    if version in affected.get("versions", ()):
        return True
    affected_now = False
    for kind, since in _events(affected):
        if kind == "introduced" and since <= Version(version):
            affected_now = True
        elif (kind == "fixed" and since <= Version(version)) or (kind == "last_affected" and since < Version(version)):
            affected_now = False
    return affected_now


def _fixed(affected: Mapping[str, Any], version: str) -> tuple[str, ...]:
    return tuple(str(since) for kind, since in _events(affected) if kind == "fixed" and since > Version(version))


def _events(affected: Mapping[str, Any]) -> list[tuple[str, Version]]:
    """Return the events of the package in the order of its versions."""
    events = []
    for span in affected.get("ranges", ()):
        for event in span.get("events", ()) if span.get("type") == "ECOSYSTEM" else ():
            for kind, since in event.items():
                try:
                    events.append((kind, Version(since)))
                except InvalidVersion:
                    continue  # old advisories contain invalid versions
    return sorted(events, key=lambda event: event[1])
