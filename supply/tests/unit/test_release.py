"""A release: the version, the changelog and the frozen contracts."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

import supply.__main__
from supply.locks import ROOT
from supply.release import ReleaseError, prepare

DAY = date(2030, 1, 2)
FROZEN = (
    "docs/openapi",
    "services/job-orchestrator/tests/documents",
    "services/result-store/tests/documents",
    "shared/scanfleet/contracts/messages/examples",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that a release changes."""
    for name in ("pyproject.toml", "cli/pyproject.toml", "CHANGELOG.md", "shared/scanfleet/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in (*FROZEN, "k8s/overlays"):
        shutil.copytree(ROOT / name, tmp_path / name)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    changed = text.replace("## [Unreleased]\n", "## [Unreleased]\n\n### Added\n- A thing.\n", 1)
    (tmp_path / "CHANGELOG.md").write_text(changed, encoding="utf-8")
    return tmp_path


def test_release_writes_its_version_everywhere(checkout: Path) -> None:
    """No file of the checkout that had the old version keeps it, and the changelog dates the changes."""
    prepare(checkout, "9.8.7", DAY)
    written = [path for path in sorted(checkout.rglob("*")) if path.is_file() and "9.8.7" in path.read_text("utf-8")]
    assert {path.relative_to(checkout).as_posix() for path in written} >= {
        "CHANGELOG.md",
        "cli/pyproject.toml",
        "k8s/overlays/production-raw-packets/kustomization.yaml",
        "k8s/overlays/production/kustomization.yaml",
        "pyproject.toml",
        "shared/scanfleet/__init__.py",
    }
    tags = re.findall(r"newTag: (\S+)", (checkout / "k8s/overlays/production/kustomization.yaml").read_text("utf-8"))
    assert set(tags) == {"9.8.7"}
    assert "## [Unreleased]\n\n## [9.8.7] - 2030-01-02\n\n### Added\n- A thing." in (
        checkout / "CHANGELOG.md"
    ).read_text("utf-8")


def test_release_commands_commit_every_file(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed commands commit new files too, and tag the commit."""

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout

    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@example.com")
    monkeypatch.setattr(supply.__main__, "ROOT", checkout)
    monkeypatch.setattr(sys, "argv", ["supply", "release", "9.8.7"])
    run("git", "init", "--quiet")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "before")
    assert supply.__main__.main() == 0
    run("sh", "-ec", capsys.readouterr().out)
    assert run("git", "status", "--porcelain") == ""
    assert run("git", "tag", "--points-at", "HEAD") == "v9.8.7\n"


@pytest.mark.parametrize("folder", FROZEN)
def test_release_freezes_its_contracts(checkout: Path, folder: str) -> None:
    """The current contracts are copied, and the record has the hash of each file of every release."""
    before = (checkout / folder / "frozen.sha256").read_text("utf-8")
    prepare(checkout, "9.8.7", DAY)
    record = (checkout / folder / "frozen.sha256").read_text("utf-8")
    assert record.startswith(before)
    new = [line.split("  ", 1) for line in record.removeprefix(before).splitlines()]
    copies = [path for path in (checkout / folder).rglob("*.json") if "9.8.7" in path.relative_to(checkout).as_posix()]
    assert [name for _, name in new] == sorted(path.relative_to(checkout / folder).as_posix() for path in copies)
    for digest, name in new:
        assert hashlib.sha256((checkout / folder / name).read_bytes()).hexdigest() == digest
    assert new


@pytest.mark.parametrize("version", ["", "0.0.1", "1.0", "1.0.0-rc1", "v1.0.0", "1.0.0\n"])
def test_release_with_a_bad_version_changes_nothing(checkout: Path, version: str) -> None:
    """A version of another form, or not above the current one, is an error."""
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    with pytest.raises(ReleaseError, match=re.escape(repr(version))):
        prepare(checkout, version, DAY)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_release_without_changes_is_an_error(checkout: Path) -> None:
    """A release needs an entry in the changelog."""
    (checkout / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.1.0]\n- First.\n", encoding="utf-8")
    with pytest.raises(ReleaseError, match="no change below"):
        prepare(checkout, "9.8.7", DAY)
