"""User grants: the networks, rate, timing, scripts and hours that each user may use, within the platform's limits.

An operator writes them into a TOML file. A scan must satisfy the limits for every user and all limits of one grant of its user.
They are checked when a job is created, when a chunk is dispatched, and by the worker before nmap starts. Only the first check
needs the roles of the caller: it stores the name of the grant in the job.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv6Network
from typing import Annotated, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scanfleet.contracts.messages.commands import MAX_ROLE_CHARS, MAX_ROLES
from scanfleet.contracts.messages.fields import MAX_ID
from scanfleet.errors import ScanfleetError
from scanfleet.scanning.policy import MAX_SCRIPTS, ScanPolicy, ScriptName
from scanfleet.scanning.targets import Network, ParsedNetwork, covers

MAX_GRANTS: Final = 1_000

_NAMED: Final = 5  # maximum number of networks, scripts or grants listed in a message
_WINDOW: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-(?:([01][0-9]|2[0-3]):([0-5][0-9])|(24):(00))")
_DAY: Final = timedelta(days=1)
_NOW: Final = timedelta()


@dataclass(frozen=True, slots=True)
class Window:
    """Hours of each day in UTC; a window whose end is before its begin extends over midnight."""

    begin: timedelta
    end: timedelta
    text: str

    @classmethod
    def parse(cls, text: str) -> Window:
        """Parse text such as "22:00-06:00"; "24:00" is the end of a day.

        Raises:
            ValueError: the syntax is different, or the window is empty.
        """
        found = _WINDOW.fullmatch(text)
        if found is None:
            raise ValueError(f'{text[:20]!r} is not a window such as "22:00-06:00"')
        begin, end = (
            timedelta(hours=int(hour), minutes=int(minute))
            for hour, minute in (found.group(1, 2), found.group(3, 4) if found[3] else found.group(5, 6))
        )
        if begin == end:
            raise ValueError(f'{text} is empty; "00:00-24:00" is the whole day')
        return cls(begin, end, text)

    def left(self, now: datetime) -> timedelta:
        """Return the time until the window closes, from `now` (UTC); zero while it is closed."""
        time = now - now.replace(hour=0, minute=0, second=0, microsecond=0)
        for begin, end in ((self.begin, self.end), (self.begin, self.end + _DAY), (self.begin - _DAY, self.end)):
            if begin < end <= begin + _DAY and begin <= time < end:
                return end - time
        return _NOW


def _window(value: object) -> object:
    return Window.parse(value) if isinstance(value, str) else value


_Role = Annotated[str, Field(min_length=1, max_length=MAX_ROLE_CHARS)]
_Id = Annotated[int, Field(ge=1, le=MAX_ID)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Limits(_Part):
    """Limits of a scan; None means unlimited."""

    networks: Annotated[list[ParsedNetwork], Field(max_length=MAX_GRANTS)] | None = None
    max_rate: Annotated[int, Field(ge=1)] | None = None
    max_timing: Annotated[int, Field(ge=0, le=5)] | None = None
    scripts: Annotated[list[ScriptName], Field(max_length=10 * MAX_SCRIPTS)] | None = None
    hours: Annotated[list[Annotated[Window, BeforeValidator(_window)]], Field(min_length=1, max_length=24)] | None = (
        None
    )

    @property
    def title(self) -> str:
        return "for every user"

    def refusal(self, network: Network, policy: ScanPolicy, nat64: Sequence[IPv6Network] = ()) -> str | None:
        """Return the reason, with the limit, for which `policy` must not scan `network`; None if it may.

        Under a limit of `max_rate` a policy without a `max_rate` is refused; `UserGrants.admit` sets it first.
        """
        if self.networks is not None and not covers(network, self.networks, nat64):
            return f"{network} is not within the networks {self.title}: {_listed(map(str, self.networks))}"
        if self.max_rate is not None:
            for name, rate in (("max_rate", policy.max_rate), ("min_rate", policy.min_rate or 0)):
                if rate is None or rate > self.max_rate:
                    given = f"{name} {rate}" if rate is not None else f"{name} without a limit"
                    return f"{given} is above {self.max_rate} probes a second, the most {self.title}"
        if self.max_timing is not None and policy.timing > self.max_timing:
            return f"timing {policy.timing} is above {self.max_timing}, the highest {self.title}"
        if self.scripts is not None and (other := sorted(set(policy.scripts).difference(self.scripts))):
            return f"scripts {_listed(other)} are not among those {self.title}: {_listed(sorted(self.scripts))}"
        return None

    def open_for(self, now: datetime) -> timedelta | None:
        """Return the time until the hours end, from `now` (UTC); zero outside of them, None without hours."""
        if self.hours is None:
            return None
        left = _NOW
        # Windows may be adjacent or overlap; then they count as one.
        while left < _DAY and (more := max(window.left(now + left) for window in self.hours)):
            left += more
        return None if left >= _DAY else left

    def closed(self, now: datetime) -> str | None:
        """Return the reason, with the hours, for which a scan has to wait; None within the hours."""
        if self.hours is None or self.open_for(now) != _NOW:
            return None
        hours = _listed(window.text for window in self.hours)
        return f"it is {now:%H:%M} UTC, and the hours {self.title} are {hours}"


class UserGrant(Limits):
    """Limits for these users and for callers with one of these roles; without users and roles, for every user."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    users: list[_Id] = []
    roles: list[_Role] = []

    @property
    def title(self) -> str:
        return f"of grant {self.name}"

    def is_for(self, user_id: int, roles: AbstractSet[str]) -> bool:
        """Return whether this caller may use the grant."""
        for_all = not self.users and not self.roles
        return for_all or user_id in self.users or not roles.isdisjoint(self.roles)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A permitted scan: the name of its grant, and its policy with the grant's maximum rate."""

    grant: str
    policy: ScanPolicy


class GrantError(ScanfleetError):
    """No grant of the user permits the scan; the message names the limit."""


class UserGrants(_Part):
    """Limits for every user, and grants; a scan needs one of them."""

    everyone: Limits = Limits()
    grants: Annotated[list[UserGrant], Field(min_length=1, max_length=MAX_GRANTS)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [grant.name for grant in self.grants]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two grants have the name {min(twice)}")
        if len(self.roles) > MAX_ROLES:
            raise ValueError(f"the grants name {len(self.roles)} roles; {MAX_ROLES} is the limit")
        return self

    @classmethod
    def parse(cls, text: str) -> UserGrants:
        """Parse the text of a file.

        Raises:
            ValueError: it is not TOML, or a value is not allowed; the message names it.
        """
        try:
            return cls.model_validate(tomllib.loads(text))
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:_NAMED])
            raise ValueError("; ".join(problems)) from error

    @property
    def roles(self) -> AbstractSet[str]:
        """The roles of all grants."""
        return frozenset(role for grant in self.grants for role in grant.roles)

    def admit(
        self,
        user_id: int,
        roles: AbstractSet[str],
        network: Network,
        policy: ScanPolicy,
        *,
        now: datetime,
        nat64: Sequence[IPv6Network] = (),
    ) -> Admitted:
        """Return the first grant of the caller that permits this scan now.

        Raises:
            GrantError: no grant permits it.
        """
        own = [grant for grant in self.grants if grant.is_for(user_id, roles)]
        if not own:
            raise GrantError(f"user {user_id} has no grant to scan")
        reasons: list[str] = []
        for grant in own:
            capped = self._capped(policy, grant)
            reason = self._refusal(grant, network, capped, nat64) or self._closed(grant, now)
            if reason is None:
                return Admitted(grant.name, capped)
            reasons.append(reason)
        raise GrantError(_listed(dict.fromkeys(reasons), "; "))

    def refusal(
        self, name: str, user_id: int, network: Network, policy: ScanPolicy, nat64: Sequence[IPv6Network] = ()
    ) -> str | None:
        """Return the reason for which a job with this grant must end, regardless of the hours; None if it may continue.

        A job that was created before grants were configured has no grant: every grant of its user without roles applies.
        """
        found = self._of(name, user_id)
        if not found:
            return f"user {user_id} has no grant {name} to scan" if name else f"user {user_id} has no grant to scan"
        reasons = [self._refusal(grant, network, policy, nat64) for grant in found]
        return None if None in reasons else reasons[0]

    def open_for(self, name: str, user_id: int, now: datetime) -> timedelta | None:
        """Return the time until the hours of a job with this grant end; zero outside of them, None without hours."""
        hours = [self._hours(grant, now) for grant in self._of(name, user_id)]
        return max(hours, key=_duration, default=None)

    def closed(self, name: str, user_id: int, now: datetime) -> str | None:
        """Return the reason for which a job with this grant has to wait for its hours; None within the hours."""
        reasons = [self._closed(grant, now) for grant in self._of(name, user_id)]
        return next(iter(reasons)) if reasons and None not in reasons else None

    def opens_at(self, name: str, user_id: int, now: datetime) -> datetime | None:
        """Return when the hours of a job with this grant begin next; None if they never do."""
        windows = [window for limits in (self.everyone, *self._of(name, user_id)) for window in limits.hours or ()]
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        begins = sorted(
            midnight + window.begin + (_DAY if midnight + window.begin < now else _NOW) for window in windows
        )
        return next((begin for begin in begins if not self.closed(name, user_id, begin)), None)

    def _of(self, name: str, user_id: int) -> Sequence[UserGrant]:
        if not name:
            return [grant for grant in self.grants if grant.is_for(user_id, set())]
        # The roles of the user are unknown here, so a grant with roles applies to every user of such a job.
        return [grant for grant in self.grants if grant.name == name and (grant.roles or grant.is_for(user_id, set()))]

    def _refusal(
        self, grant: UserGrant, network: Network, policy: ScanPolicy, nat64: Sequence[IPv6Network]
    ) -> str | None:
        return self.everyone.refusal(network, policy, nat64) or grant.refusal(network, policy, nat64)

    def _closed(self, grant: UserGrant, now: datetime) -> str | None:
        return self.everyone.closed(now) or grant.closed(now)

    def _hours(self, grant: UserGrant, now: datetime) -> timedelta | None:
        return min(self.everyone.open_for(now), grant.open_for(now), key=_duration)

    def _capped(self, policy: ScanPolicy, grant: UserGrant) -> ScanPolicy:
        rates = [rate for rate in (self.everyone.max_rate, grant.max_rate) if rate is not None]
        if policy.max_rate is not None or not rates:
            return policy
        return policy.model_copy(update={"max_rate": min(rates)})


def _duration(left: timedelta | None) -> timedelta:
    return timedelta.max if left is None else left


def _listed(texts: Iterable[str], separator: str = ", ") -> str:
    listed = list(texts)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return (separator.join(listed[:_NAMED]) or "none") + more
