"""Operators' commands: who ran one, as the audit log records it."""

from __future__ import annotations

import json
import os
import pwd

import pytest
import structlog

from scanfleet.runtime.operator_command import command_entry, run


@pytest.mark.parametrize("variable", ["LOGNAME", "USER", "LNAME", "USERNAME"])
def test_command_entry_with_a_user_in_the_environment_names_the_process_user(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator cannot choose the name in the audit log by a variable."""
    monkeypatch.setenv(variable, "another-user")
    name = pwd.getpwuid(os.getuid()).pw_name
    assert command_entry("operator", "create_acls", "x").source == f"command line, system user {name}"


def test_command_entry_of_a_user_without_a_name_has_the_user_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as an id without a line in /etc/passwd."""
    monkeypatch.setattr(os, "getuid", lambda: 4_123_456_789)
    assert command_entry("operator", "create_acls", "x").source == "command line, system user 4123456789"


def test_run_logs_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output carries only the result of a command, whatever its parts log."""

    async def work() -> str:
        structlog.get_logger().error("bus_failed", cause="the\nbroker", exc_info=ValueError("wrong"))
        return "done\n"

    try:
        assert run(work()) == 0
    finally:
        structlog.reset_defaults()
    printed = capsys.readouterr()
    assert printed.out == "done\n"
    line = json.loads(printed.err)
    assert (line["event"], line["level"], line["cause"]) == ("bus_failed", "error", "the\nbroker")
    assert "ValueError: wrong" in line["exception"]
