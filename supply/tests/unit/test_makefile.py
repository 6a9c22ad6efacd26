"""The targets of the Makefile, and what `make setup` installs unseen."""

from __future__ import annotations

import json
import re
import subprocess
from hashlib import file_digest
from typing import Final

from scanfleet.services import IMAGES
from supply.locks import ROOT

MAKEFILE: Final = (ROOT / "Makefile").read_text(encoding="utf-8")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_licences_target_lists_every_image() -> None:
    """`make licences` prints a line for each image."""
    run = make("licences")
    assert run.returncode == 0
    assert [line.partition(":")[0] for line in run.stdout.splitlines()] == list(IMAGES)


def test_sbom_target_writes_a_document_of_each_image() -> None:
    """`make sbom` prints the files that it writes, each a CycloneDX document."""
    run = make("sbom")
    assert run.returncode == 0
    documents = [json.loads((ROOT / line).read_text(encoding="utf-8")) for line in run.stdout.splitlines()]
    assert [document["metadata"]["component"]["bom-ref"] for document in documents] == list(IMAGES)
    assert {document["bomFormat"] for document in documents} == {"CycloneDX"}


def test_audit_target_fails_without_advisories_that_are_required() -> None:
    """`make audit` passes its options on."""
    run = make("audit", "ADVISORIES=missing.zip", "NPM_ADVISORIES=absent.zip", "REQUIRED=1")
    assert run.returncode != 0
    assert "NOT AUDITED: PyPI packages: missing.zip cannot be read" in run.stderr
    assert "NOT AUDITED: npm packages: absent.zip cannot be read" in run.stderr


def test_ci_runs_the_targets() -> None:
    """The targets behave the same locally and in CI."""
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {"make test", "make sbom", "make audit"} <= set(lines)


def test_kafka_matches_its_checksums() -> None:
    """Each jar of the local Kafka has the checksum of local/kafka.sha256, which `make setup` compares, and there is no other."""
    expected = {}
    for line in (ROOT / "local/kafka.sha256").read_text(encoding="utf-8").splitlines():
        checksum, name = line.split("  ")
        expected[name] = checksum
    found = {}
    for jar in (ROOT / ".local/tools/kafka").glob("*.jar"):
        with jar.open("rb") as file:
            found[jar.name] = file_digest(file, "sha256").hexdigest()
    assert found == expected
    assert "sha256sum --check --strict --quiet '$(CURDIR)/local/kafka.sha256'" in MAKEFILE


def test_python_packages_are_installed_by_hash() -> None:
    """Recipes install packages by hash, except our own project, and the wheel that is tried as users install it."""
    recipes = re.sub(r"\\\n\s*", " ", MAKEFILE).splitlines()
    installs = [line for line in recipes if re.search(r"pip install", line)]
    assert len(installs) == 6
    installs = [line for line in installs if "dist/scanfleet_cli-" not in line]
    assert [line for line in installs if "--require-hashes" not in line and "--no-deps" not in line] == []
