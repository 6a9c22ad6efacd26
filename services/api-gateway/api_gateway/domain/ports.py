"""The ports of the handlers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from scanfleet.contracts.messages import CommandReply


class Arbiter(Protocol):
    """Decides commands without a reply."""

    async def expire(self, command_id: str, headers: Mapping[str, str]) -> CommandReply | None:
        """Expire the command and return None, or return its reply if it had been decided before.

        Args:
            command_id: of the command.
            headers: the caller's identity, as HTTP headers.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
