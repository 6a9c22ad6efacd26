"""The wheel: its content, and the command that it installs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from importlib.metadata import distribution, distributions
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scanfleet import VERSION

ROOT = Path(__file__).parents[3]
CLI = ROOT / "cli"


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


def required(names: Iterable[str]) -> set[str]:
    """The distributions that these require on this machine, themselves included."""
    found: set[str] = set()
    left = [Requirement(name) for name in names]
    while left:
        one = left.pop()
        wanted = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in one.extras or {""})
        if wanted and (name := canonicalize_name(one.name)) not in found:
            found.add(name)
            left += map(Requirement, distribution(name).requires or ())
    return found


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in a new environment with its wheel and the packages that the wheel requires, all without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", folder, CLI], check=True)
    (wheel,) = folder.glob("scanfleet_cli-*.whl")
    environment = folder / "venv"
    venv.create(environment)
    subprocess.run([*pip, "--python", environment, "install", "--no-index", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (installed,) = distributions(path=[str(packages)])
    for name in required(installed.requires or ()):
        there = distribution(name)
        for top in {file.parts[0] for file in there.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            if not (packages / top).exists():  # two distributions may share a namespace
                (packages / top).symlink_to(str(there.locate_file(top)))
    return environment / "bin" / "scanfleet"


@pytest.mark.parametrize("arguments", [["version"], ["--help"], ["policy", "create", "--help"], ["login", "--help"]])
def test_command_of_the_wheel_starts_with_its_requirements_alone(
    command: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """On a machine without a checkout every module that the command needs is in the wheel or required by it."""
    ended = subprocess.run(
        [command, *arguments], cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"scanfleet {VERSION}" if arguments == ["version"] else "Usage: scanfleet")


def test_wheel_imports_are_included_or_required(command: Path, tmp_path: Path) -> None:
    """Imports within functions need nothing else either, except the keyring, which is optional."""
    graph = grimp.build_graph("scanfleet_cli", "scanfleet", include_external_packages=True, cache_dir=None)
    own = {module for module in graph.modules if module.partition(".")[0] == "scanfleet_cli"}
    needed = own | {each for module in own for each in graph.find_upstream_modules(module)}
    names = sorted(needed - sys.stdlib_module_names - {"keyring", "scanfleet_cli.__main__"})
    loaded = f"import {', '.join(names)}; print(scanfleet.__file__)"
    ended = subprocess.run(
        [command.with_name("python"), "-c", loaded], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert Path(ended.stdout.strip()).is_relative_to(command.parents[1])
