"""A restore of the local stack."""

from __future__ import annotations

from pathlib import Path

import pytest

from local.stack import Stack, StackError


def test_restore_of_a_missing_backup_keeps_the_data(tmp_path: Path) -> None:
    """A folder that is not a backup is refused before anything is stopped or deleted."""
    stack = Stack(tmp_path / "stack")
    stack.servers.mongodb_files.mkdir(parents=True)
    data = stack.servers.mongodb_files / "WiredTiger"
    data.touch()
    with pytest.raises(StackError, match="has no backup"):
        stack.restore(tmp_path / "mistyped")
    assert data.exists()
