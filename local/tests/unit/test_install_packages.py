"""What `local/install-packages` installs, with stand-ins for the programs that it looks for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from local.paths import ROOT

PRESENT = ("nmap", "mvn", "curl", "python3")
USED = ("bash", "seq", "sed", "mkdir", "id", "env", "touch")
LIBCURL = "\tlibcurl.so.4 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcurl.so.4"


def program(folder: Path, name: str, script: str = "") -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH with everything but mongod, whose `apt-get` leaves a file behind."""
    for name in USED:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    for name in PRESENT:
        program(tmp_path, name)
    program(tmp_path, "java", "echo 'openjdk version \"17.0.1\"' >&2")
    program(tmp_path, "sudo", '"$@"')
    program(tmp_path, "apt-get", f'echo "$@" >> {tmp_path}/installed')
    return tmp_path


def installed(machine: Path, *programs: str) -> str:
    environment = {**os.environ, "PATH": str(machine), "PYTHON": "python3"}
    command = [str(ROOT / "local/install-packages"), *programs]
    subprocess.run(command, env=environment, cwd=machine, check=True, capture_output=True)
    log = machine / "installed"
    return log.read_text() if log.exists() else ""


def test_listed_library_is_not_installed_again(machine: Path) -> None:
    """With libcurl at the top of a list that exceeds a pipe's buffer, nothing is installed."""
    program(
        machine,
        "ldconfig",
        f"echo '{LIBCURL}'\nfor n in $(seq 20000); do echo \"lib$n.so.1 => /usr/lib/lib$n.so.1\"; done",
    )
    assert "libcurl4" not in installed(machine)


def test_missing_library_is_installed(machine: Path) -> None:
    """Without libcurl in the list its package is installed."""
    program(machine, "ldconfig", "echo 'libcurl-gnutls.so.4 => /usr/lib/libcurl-gnutls.so.4'")
    assert "libcurl4" in installed(machine)


def test_missing_programs_of_the_arguments_are_installed(machine: Path) -> None:
    """Of the programs that the arguments name, the package of each missing one is installed."""
    program(machine, "ldconfig", f"echo '{LIBCURL}'")
    program(machine, "wrk")
    words = installed(machine, "wrk", "redis-server").split()
    assert "redis-server" in words
    assert "wrk" not in words
