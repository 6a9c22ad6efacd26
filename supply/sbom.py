"""CycloneDX documents of the images: the code, the packages of its lock, and other installed software."""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from supply.licences import BESIDE, expression, licence
from supply.locks import ROOT, packages


def document(image: str) -> str:
    """Return the CycloneDX 1.6 document of an image, without the content of its base image."""
    whole = Component(
        name=f"scanfleet/{image}",
        type=ComponentType.CONTAINER,
        bom_ref=image,
        licenses=[LicenseExpression(expression(image))],
    )
    parts = [
        Component(
            name=package.name,
            version=package.version,
            type=ComponentType.LIBRARY,
            purl=(purl := PackageURL("pypi", name=package.name, version=package.version)),
            bom_ref=str(purl),
            licenses=[LicenseExpression(licence(package))],
        )
        for package in packages(image)
    ]
    parts += [
        # The version is the base image's distribution's, known when the image is built.
        Component(
            name=name,
            type=ComponentType.APPLICATION,
            purl=(purl := PackageURL("deb", "debian", name)),
            bom_ref=str(purl),
            licenses=[LicenseExpression(terms)],
        )
        for name, terms in BESIDE.get(image, {}).items()
    ]
    lock = (ROOT / "requirements" / f"{image}.txt").read_bytes()
    bom = Bom(components=parts, serial_number=uuid5(NAMESPACE_URL, lock.decode()))
    bom.metadata.component = whole
    bom.register_dependency(whole, parts)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
