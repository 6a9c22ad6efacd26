"""The documents of what the images hold."""

from __future__ import annotations

import json

import pytest

from scanfleet.services import IMAGES
from supply import sbom
from supply.locks import ROOT, contents, page_packages


@pytest.mark.parametrize("image", IMAGES)
def test_document_lists_each_package_of_the_image(image: str) -> None:
    """Every package is a component with its version, package URL and licence, and the image depends on it."""
    document = json.loads(sbom.document(image))
    libraries = [part for part in document["components"] if part["type"] == "library"]
    found = {("/".join(filter(None, (part.get("group"), part["name"]))), part["version"]) for part in libraries}
    assert found == {(package.name, package.version) for package in contents(image)}
    assert all(part["purl"].startswith("pkg:") and part["licenses"] for part in document["components"])
    (edges,) = [each for each in document["dependencies"] if each["ref"] == image]
    assert set(edges["dependsOn"]) == {part["bom-ref"] for part in document["components"]}


def test_document_of_the_worker_lists_nmap() -> None:
    """Components other than Python packages are listed too."""
    assert "pkg:deb/debian/nmap" in sbom.document("scanner-worker")
    assert "pkg:deb/debian/nmap" not in sbom.document("api-gateway")


def test_document_of_the_gateway_lists_the_page() -> None:
    """The npm packages that the build reports as bundled, and no others, are components of the gateway, with their hashes."""
    built = (ROOT / "services/api-gateway/api_gateway/page/licences.txt").read_text(encoding="utf-8").splitlines()
    bundled = {
        f"pkg:npm/{each.name.replace('@', '%40')}@{each.version}" for each in page_packages() if each.name in built
    }
    for image in IMAGES:
        components = json.loads(sbom.document(image))["components"]
        found = {part["purl"]: part for part in components if part["purl"].startswith("pkg:npm/")}
        assert set(found) == (bundled if image == "api-gateway" else set())
        assert all(len(bytes.fromhex(part["hashes"][0]["content"])) == 64 for part in found.values())
    assert any(purl.startswith("pkg:npm/preact@") for purl in bundled)


def test_document_has_the_serial_number_of_its_packages() -> None:
    """The same packages give the same serial number, and each image has its own."""
    numbers = [json.loads(sbom.document(image))["serialNumber"] for image in ("api-gateway", *IMAGES)]
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == len(IMAGES)
