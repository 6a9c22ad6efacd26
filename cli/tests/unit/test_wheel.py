"""The content of the wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp

from scanfleet import VERSION

ROOT = Path(__file__).parents[3]


def test_wheel_holds_the_modules_that_the_command_imports() -> None:
    """Of our own packages the wheel has exactly what `scanfleet_cli` imports, directly or not."""
    graph = grimp.build_graph("scanfleet_cli", "scanfleet", cache_dir=None)
    own = {module for module in graph.modules if module.partition(".")[0] == "scanfleet_cli"}
    needed = {each for module in own for each in graph.find_upstream_modules(module)} - own
    project = tomllib.loads((ROOT / "cli" / "pyproject.toml").read_text(encoding="utf-8"))
    files = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    packed = {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files.values()}
    packages = {module.rpartition(".")[0] for module in needed} - {""}
    assert packed - {"scanfleet.py.typed"} == needed | packages
    assert all((ROOT / "cli" / source).is_file() for source in files)


def test_wheel_has_the_version_of_the_release() -> None:
    """The wheel, the services and the checkout have one version."""
    versions = [
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        for folder in (".", "cli")
    ]
    assert versions == [VERSION, VERSION]
