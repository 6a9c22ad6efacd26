"""One way to be a command of an operator's: it says what it did, or why it could not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

from scanfleet.errors import DependencyError


def run(work: Coroutine[Any, Any, str]) -> int:
    """Do it and say what it answers, on standard output; what is away is said on standard error.

    Returns:
        The exit code: 1 when something was away, and the command may be called again.
    """
    try:
        said = asyncio.run(work)
    except DependencyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(said)
    return 0
