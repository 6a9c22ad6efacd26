"""Operators' commands: who ran one, as the audit log records it."""

from __future__ import annotations

import os
import pwd

import pytest

from scanfleet.runtime.operator_command import command_entry


@pytest.mark.parametrize("variable", ["LOGNAME", "USER", "LNAME", "USERNAME"])
def test_command_entry_with_a_user_in_the_environment_names_the_process_user(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator cannot choose the name in the audit log by a variable."""
    monkeypatch.setenv(variable, "somebody-else")
    name = pwd.getpwuid(os.getuid()).pw_name
    assert command_entry("operator", "create_acls", "x").source == f"command line, system user {name}"


def test_command_entry_of_a_user_without_a_name_has_the_user_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as an id without a line in /etc/passwd."""
    monkeypatch.setattr(os, "getuid", lambda: 4_123_456_789)
    assert command_entry("operator", "create_acls", "x").source == "command line, system user 4123456789"
