"""The documents of what the images hold."""

from __future__ import annotations

import json

import pytest

from scanfleet.services import IMAGES
from supply import sbom
from supply.locks import packages


@pytest.mark.parametrize("image", IMAGES)
def test_document_lists_each_package_of_the_image(image: str) -> None:
    """Every package of the lock is a component with its version, package URL and licence, and the image depends on it."""
    document = json.loads(sbom.document(image))
    found = {(part["name"], part["version"]) for part in document["components"] if part["type"] == "library"}
    assert found == {(package.name, package.version) for package in packages(image)}
    assert all(part["purl"].startswith("pkg:") and part["licenses"] for part in document["components"])
    (edges,) = [each for each in document["dependencies"] if each["ref"] == image]
    assert set(edges["dependsOn"]) == {part["bom-ref"] for part in document["components"]}


def test_document_of_the_worker_lists_nmap() -> None:
    """Components other than Python packages are listed too."""
    assert "pkg:deb/debian/nmap" in sbom.document("scanner-worker")
    assert "pkg:deb/debian/nmap" not in sbom.document("api-gateway")


def test_document_has_the_serial_number_of_its_lock() -> None:
    """The same lock gives the same serial number, and another lock another."""
    numbers = [json.loads(sbom.document(image))["serialNumber"] for image in ("api-gateway", *IMAGES)]
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == len(IMAGES)
