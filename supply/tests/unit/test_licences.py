"""Which licences are let into an image."""

from __future__ import annotations

import json
import re
from email.message import Message
from pathlib import Path

import pytest

from scanfleet.services import IMAGES
from supply import licences, locks
from supply.locks import ROOT, Package


def test_problems_of_the_locks_are_none() -> None:
    """Every package of every lock has a licence that is allowed there."""
    assert licences.problems() == []


def test_problems_name_a_package_with_another_licence() -> None:
    """A licence beyond the list is a problem of each lock that has the package, except where it is excepted by name."""
    found = licences.problems(exceptions={lock: licences.EXCEPTIONS[lock] for lock in ("dev", "page")})
    assert found == ["scanner-worker: python-nmap is under GPL-3.0-or-later, which is not among the allowed licences"]


def test_problems_name_a_package_without_a_known_licence() -> None:
    """A package with an unknown licence is a problem."""

    def unknown(package: Package) -> str:
        if package.name == "motor":
            raise licences.UnknownLicenceError("motor names none")
        return "MIT"

    assert licences.problems(unknown) == [
        f"{lock}: motor names none" for lock in ("job-orchestrator", "result-store", "dev")
    ]


@pytest.mark.parametrize(
    ("entry", "locks_with_it", "problem"),
    [
        ({"license": "GPL-3.0-only"}, ["api-gateway", "page"], "@a/b is under GPL-3.0-only, which is not among"),
        ({"license": "GPL-3.0-only", "dev": True}, ["page"], "@a/b is under GPL-3.0-only, which is not among"),
        ({"license": "SEE LICENSE IN TERMS"}, ["api-gateway", "page"], "@a/b 1.0.0 has a licence that is not in the"),
        ({}, ["api-gateway", "page"], "@a/b 1.0.0 has a licence that is not in the table"),
        ({"license": "MIT"}, [], ""),
    ],
)
def test_problems_name_an_npm_package_with_another_licence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: dict[str, object], locks_with_it: list[str], problem: str
) -> None:
    """The licences in the page's lock are checked as those of Python packages, for the gateway's image too if bundled."""
    lock = tmp_path / "package-lock.json"
    entries = {"": {"name": "page"}, "node_modules/@a/b": {"version": "1.0.0", "integrity": "sha512-AA==", **entry}}
    lock.write_text(json.dumps({"packages": entries}), encoding="utf-8")
    monkeypatch.setattr(locks, "PAGE_LOCK", lock)
    found = [each.partition(": ") for each in licences.problems()]
    assert [lock for lock, _, _ in found] == locks_with_it
    assert all(text.startswith(problem) for _, _, text in found)


def test_licence_without_an_optional_field_reads_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata that raise for a missing field, as the backport of importlib.metadata does, yield the licence they have."""

    class Strict(Message):
        def __getitem__(self, name: str) -> str:
            raise KeyError(name)

    metadata = Strict()
    metadata["Classifier"] = "License :: OSI Approved :: MIT License"
    monkeypatch.setattr(licences, "metadata", lambda _: metadata)
    assert licences.licence.__wrapped__(Package("sample", "1.0")) == "MIT"


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR GPL-3.0-only) AND Apache-2.0", True),
        ("LicenseRef-NPSL", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
    ],
)
def test_allowed_needs_a_choice_of_allowed_licences(expression: str, allowed: bool) -> None:
    """Of alternatives one must be allowed, of parts each."""
    assert licences.allowed(expression) is allowed


@pytest.mark.parametrize("image", IMAGES)
def test_expression_is_the_label_of_the_image(image: str) -> None:
    """Each image is labelled with the licences of all that it holds beside its base image."""
    stage = (ROOT / "Dockerfile").read_text().partition(f" AS for-{image}\n")[2].partition("FROM ")[0]
    assert re.findall(r'^LABEL org\.opencontainers\.image\.licenses="(.*)"$', stage, re.MULTILINE) == [
        licences.expression(image),
    ]


def test_notice_lists_each_licence_exception() -> None:
    """NOTICE explains each part of an image whose licence is an exception."""
    notice = (ROOT / "NOTICE").read_text()
    for image in IMAGES:
        for part in (*licences.EXCEPTIONS.get(image, ()), *licences.BESIDE.get(image, ())):
            assert re.search(rf"^{part}\b", notice, re.MULTILINE), part
