"""Prepare a release in a checkout: the version wherever it is written, the changelog, and frozen contracts and documents."""

from __future__ import annotations

import hashlib
import re
import shutil
from datetime import date
from pathlib import Path
from typing import Final

_VERSION: Final = re.compile(r"\d+\.\d+\.\d+")
_WRITTEN: Final = {
    "pyproject.toml": 'version = "{}"',
    "cli/pyproject.toml": 'version = "{}"',
    "shared/scanfleet/__init__.py": 'VERSION: Final = "{}"',
    "k8s/overlays/production/kustomization.yaml": "newTag: {}",
    "k8s/overlays/production-raw-packets/kustomization.yaml": "newTag: {}",
}
_API: Final = "docs/openapi"
_EXAMPLES: Final = (
    "shared/scanfleet/contracts/messages/examples",
    "services/job-orchestrator/tests/documents",
    "services/result-store/tests/documents",
)
_UNRELEASED: Final = "## [Unreleased]\n"


class ReleaseError(Exception):
    """The release cannot be prepared; the message has the file and the reason."""


def prepare(root: Path, version: str, today: date) -> None:
    """Write the version and freeze the contracts of the release.

    Args:
        root: the checkout.
        version: of the release, in the form MAJOR.MINOR.PATCH.
        today: its date in the changelog.

    Raises:
        ReleaseError: nothing was changed.
    """
    before = re.search(_pattern("pyproject.toml"), _read(root / "pyproject.toml"))
    if not _VERSION.fullmatch(version) or before is None or _numbers(version) <= _numbers(before[1]):
        raise ReleaseError(
            f"{version!r} is not a version above {before[1] if before else 'none'}: "
            "name a higher one, in the form MAJOR.MINOR.PATCH"
        )
    changes = _read(root / "CHANGELOG.md").partition(_UNRELEASED)[2].partition("\n## [")[0]
    if "- " not in changes:
        raise ReleaseError("CHANGELOG.md has no change below [Unreleased]")
    if missing := [name for name in _WRITTEN if not re.search(_pattern(name), _read(root / name))]:
        raise ReleaseError(f"{missing[0]} does not contain its version")
    for name, form in _WRITTEN.items():
        _edit(root / name, _pattern(name), form.format(version))
    _edit(root / "CHANGELOG.md", re.escape(_UNRELEASED), f"{_UNRELEASED}\n## [{version}] - {today.isoformat()}\n")
    shutil.copyfile(root / _API / "current.json", root / _API / f"{version}.json")
    for folder in _EXAMPLES:
        shutil.copytree(root / folder / "current", root / folder / version)
    for folder in (_API, *_EXAMPLES):
        _freeze(root / folder, version)


def _pattern(name: str) -> str:
    return re.escape(_WRITTEN[name]).replace(r"\{\}", rf"({_VERSION.pattern})")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _freeze(folder: Path, version: str) -> None:
    """Record the hash of each file of the release, in the form of sha256sum."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*.json"))
        if path.relative_to(folder).parts[0] in {version, f"{version}.json"}
    ]
    with (folder / "frozen.sha256").open("a", encoding="utf-8") as record:
        record.writelines(lines)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _edit(path: Path, pattern: str, text: str) -> None:
    path.write_text(re.sub(pattern, lambda _: text, _read(path)), encoding="utf-8")
