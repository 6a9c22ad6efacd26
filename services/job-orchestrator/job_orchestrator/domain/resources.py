"""Resources: objects of a kind, each owned by one user."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Generic, Self, TypeVar

from scanfleet.scanning.policy import ScanPolicy

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned(Generic[Content]):
    """One object, with the content that is specific to its kind."""

    id: int
    user_id: int
    name: str
    content: Content
    created_at: datetime
    updated_at: datetime

    def revised(self, name: str, content: Content, now: datetime) -> Self:
        """Return a later state of the object; each state has its own time."""
        updated_at = max(now, self.updated_at + timedelta(milliseconds=1))
        return replace(self, name=name, content=content, updated_at=updated_at)


@dataclass(frozen=True, slots=True)
class ScanTarget:
    """The network of a subnet and its exclusions, in canonical form."""

    cidr: str
    exclude: tuple[str, ...] = ()


# Types only: an alias of a frozen class with slots cannot be called.
Subnet = Owned[ScanTarget]
Policy = Owned[ScanPolicy]
