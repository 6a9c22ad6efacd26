"""CycloneDX documents of the images: the code, its packages, and other installed software."""

from __future__ import annotations

from base64 import b64decode
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.hash.factories import HashTypeFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from supply.licences import BESIDE, expression, licence
from supply.locks import Package, contents


def document(image: str) -> str:
    """Return the CycloneDX 1.6 document of an image, without the content of its base image."""
    whole = Component(
        name=f"scanfleet/{image}",
        type=ComponentType.CONTAINER,
        bom_ref=image,
        licenses=[LicenseExpression(expression(image))],
    )
    parts = [_library(package) for package in contents(image)]
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
    pins = "\n".join([image, *(str(part.bom_ref.value) for part in parts)])
    bom = Bom(components=parts, serial_number=uuid5(NAMESPACE_URL, pins))
    bom.metadata.component = whole
    bom.register_dependency(whole, parts)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _library(package: Package) -> Component:
    scope, _, name = package.name.rpartition("/")
    purl = PackageURL(package.ecosystem.lower(), scope or None, name, package.version)
    return Component(
        group=scope or None,
        name=name,
        version=package.version,
        type=ComponentType.LIBRARY,
        purl=purl,
        bom_ref=str(purl),
        licenses=[LicenseExpression(licence(package))],
        hashes=[
            HashTypeFactory().from_hashlib_alg(algorithm, b64decode(digest).hex())
            for algorithm, _, digest in (each.partition("-") for each in package.integrity.split())
        ],
    )
