"""The entry point of operators' commands: print the result, or the reason for the failure."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

from scanfleet.errors import DependencyError


def run(work: Coroutine[Any, Any, str]) -> int:
    """Run `work` and print its result on standard output, or the unavailable dependency on standard error.

    Returns:
        The exit code: 1 when a dependency was unavailable and the command may be run again.
    """
    try:
        result = asyncio.run(work)
    except DependencyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(result)
    return 0
