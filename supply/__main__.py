"""`python -m supply licences|sbom FOLDER|audit [--advisories ZIP] [--npm-advisories ZIP] [--required]|release VERSION`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from scanfleet.clock import utc_now
from scanfleet.services import IMAGES
from supply import licences, sbom
from supply.audit import NotAuditedError, audit
from supply.locks import ROOT, Ecosystem
from supply.release import ReleaseError, prepare


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m supply", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("licences", help="list the licences of each image; fail if one is not allowed")
    commands.add_parser("sbom", help="write a CycloneDX document for each image").add_argument("folder", type=Path)
    audited = commands.add_parser("audit", help="fail on a vulnerable package that a release fixes")
    audited.add_argument(
        "--advisories", type=Path, help="PyPI advisories in OSV's format, a zip file; without it, OSV is queried"
    )
    audited.add_argument("--npm-advisories", type=Path, help="the same for npm")
    audited.add_argument("--required", action="store_true", help="fail when the advisories cannot be read")
    commands.add_parser("release", help="write a version and freeze its contracts").add_argument("version")
    arguments = parser.parse_args()
    match arguments.command:
        case "licences":
            return _licences()
        case "sbom":
            return _sbom(arguments.folder)
        case "release":
            return _release(arguments.version)
        case _:
            exports: dict[Ecosystem, Path | None] = {
                "PyPI": arguments.advisories,
                "npm": arguments.npm_advisories,
            }
            return _audit(exports, required=arguments.required)


def _licences() -> int:
    for image in IMAGES:
        print(f"{image}: {licences.expression(image)}")
    problems = licences.problems()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _sbom(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for image in IMAGES:
        file = folder / f"{image}.cdx.json"
        file.write_text(sbom.document(image), encoding="utf-8")
        print(file)
    return 0


def _audit(exports: Mapping[Ecosystem, Path | None], *, required: bool) -> int:
    failed = False
    for ecosystem, advisories in exports.items():
        try:
            findings, audited = audit(ecosystem, advisories)
        except NotAuditedError as error:
            print(f"NOT AUDITED: {ecosystem} packages: {error}", file=sys.stderr)
            failed |= required
            continue
        for finding in findings:
            print(finding)
        print(f"{audited} {ecosystem} packages audited, {len(findings)} findings")
        failed |= any(finding.fixed for finding in findings)
    return int(failed)


def _release(version: str) -> int:
    try:
        prepare(ROOT, version, utc_now().date())
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"git add --all && git commit --message 'release: prepare {version}' && git tag --annotate v{version} --message v{version}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
