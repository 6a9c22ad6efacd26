"""Subnets and policies, each owned by one user."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from scanfleet.scanning.policy import ScanPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    id: int
    user_id: int
    name: str
    cidr: str
    exclude: tuple[str, ...]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    id: int
    user_id: int
    name: str
    scan: ScanPolicy
    created_at: datetime
    updated_at: datetime
