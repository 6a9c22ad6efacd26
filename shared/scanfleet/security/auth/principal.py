"""The caller, and the refusal of a token."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller that a verified token names."""

    user_id: int
    """0 in internal tokens for requests of the gateway itself."""

    admin: bool = False
    roles: frozenset[str] = field(default=frozenset(), compare=False)
    """Of the roles in the caller's token those that grants name; few internal tokens have them."""

    token_hash: str = field(default="", compare=False)
    """Identifies the caller's token in the logs of every service without revealing it."""

    expires_at: float = field(default=0.0, compare=False)
    """When the token ends, in Unix time; 0 in an internal token."""


class RefusedError(Exception):
    """A token is refused.

    Attributes:
        part: the claim, header parameter or segment that is wrong.
        reason: the problem, without the value.
        message: text for the caller.
    """

    def __init__(self, part: str, reason: str, *, message: str = "the token is not valid") -> None:
        super().__init__(f"{part} {reason}")
        self.part = part
        self.reason = reason
        self.message = message
