"""The output of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from local import demo


def test_plain_nmap_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that the demo compares with can be copied, whatever the width of the terminal."""
    nmap = tmp_path / ("n" * 80)
    nmap.write_text("#!/bin/sh\necho '<nmaprun/>'\n")
    nmap.chmod(0o755)
    assert demo._plain_nmap([str(nmap)], "22,80") == ([], 0)
    options = "-n -sT -sV --version-intensity 7 -T4 -p 22,80 -oX -"
    assert capsys.readouterr().out == f"{nmap} {options} {demo.SUBNET}\n"
