"""Who calls, and why a token is refused."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller that a verified token names."""

    user_id: int
    """0 in an internal token that no user's request is behind: the gateway asks for itself."""

    admin: bool = False
    token_hash: str = field(default="", compare=False)
    """Names the caller's token in the logs of every service without holding any of it."""

    expires_at: float = field(default=0.0, compare=False)
    """When the token ends, in Unix time; 0 in an internal token."""


class RefusedError(Exception):
    """A token is refused.

    Attributes:
        part: the claim, header parameter or segment that is wrong.
        reason: what is wrong with it; never holds its value.
        message: what the caller reads.
    """

    def __init__(self, part: str, reason: str, *, message: str = "the token is not valid") -> None:
        super().__init__(f"{part} {reason}")
        self.part = part
        self.reason = reason
        self.message = message
