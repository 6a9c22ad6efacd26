"""The running gateway conforms to its OpenAPI document for generated requests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from local.stack import Stack

pytestmark = pytest.mark.e2e


@pytest.mark.proves("A2", "A11", "A12", "G13", "G14")
@pytest.mark.parametrize("user", [None, 31], ids=["without a token", "with a token"])
def test_generated_requests_conform_to_the_document(stack: Stack, tmp_path: Path, user: int | None) -> None:
    """No request that schemathesis generates from the document gets a 5xx or an undocumented answer."""
    # The stream of all jobs never ends: schemathesis reads it until the timeout, each time.
    (tmp_path / "schemathesis.toml").write_text(
        '[[operations]]\ninclude-path = "/api/v1/events"\nrequest-timeout = 2.0\n'
    )
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{stack.url}/openapi.json"),
        # No schema contains the allowed networks or the caller's objects, so schema-valid requests may be rejected.
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--no-color"),
        *("--generation-deterministic", "--max-examples", "10"),
    ]
    if user is not None:
        command += ["--header", f"Authorization: Bearer {stack.token(user)}"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
