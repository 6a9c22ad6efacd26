"""The audit log, revoked tokens, sessions, and the caller's identity and limits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, ConfigDict, Field, model_validator

from scanfleet.clock import Time
from scanfleet.contracts.messages import audit
from scanfleet.contracts.rest.base import Answer, Body, Id, InputTime, Text
from scanfleet.scanning.policy import Preset, ScanPolicy

# Audit


class AuditEntry(audit.AuditEntry):
    """One change or refusal."""

    received_at: Time
    """Time of recording, which orders the log; `time` is set by the reporting service."""

    genuine: bool = True
    """False if the platform has not signed the entry in this form: it was changed or added in the database."""


class AuditList(Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    entries: list[AuditEntry]
    total: int
    """With filters, counted up to 10,000. On later pages it exceeds the number of entries up to that page while more may follow."""

    page: int
    page_size: int


class RevocationBody(Body):
    """The tokens to revoke: exactly one of `jti`, `sub` and `user_id`."""

    jti: Text | None = None
    """Id of a single token."""

    sub: Text | None = None
    """The user's name at the issuer."""

    user_id: Id | None = None
    issued_before: InputTime | None = None
    """Revoke only the user's tokens issued before this time; default now."""

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if sum(each is not None for each in (self.jti, self.sub, self.user_id)) != 1:
            raise ValueError("give exactly one of jti, sub and user_id")
        if self.jti is not None and self.issued_before is not None:
            raise ValueError("issued_before needs sub or user_id")
        if self.issued_before is not None and self.issued_before.year < 1970:  # noqa: PLR2004 # start of Unix time
            raise ValueError("issued_before is before 1970")
        return self


class Revoked(Answer):
    """Revoked tokens. Not part of the public API."""

    jti: str | None
    sub: str | None
    user_id: int | None
    issued_before: AwareDatetime | None


class Revocation(Revoked):
    id: int
    created_by: int
    created_at: AwareDatetime
    expires_at: AwareDatetime


class RevocationList(Answer):
    revocations: list[Revocation]
    total: int
    page: int
    page_size: int


class SessionEnded(Answer):
    logout_url: str | None
    """The issuer's URL for sign-out; null if it has none."""


class Subject(Body):
    """A user's name at the issuer. Not part of the public API."""

    issuer: Annotated[str, Field(min_length=1, max_length=2_000)]
    subject: Text


MAX_ISSUER_KEYS = 100  # recorded keys; an issuer has only a few


class IssuerKeys(Body):
    """Keys of an issuer that verify tokens, by their names. Not part of the public API."""

    issuer: Annotated[str, Field(min_length=1, max_length=2_000)]
    keys: Annotated[list[Text], Field(max_length=MAX_ISSUER_KEYS)]


class UserId(Answer):
    """Not part of the public API."""

    user_id: Id


# The platform and the caller


class ScanLimits(Answer):
    """The orchestrator's limits of scans. Not part of the public API by itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    presets: dict[Preset, ScanPolicy]
    """The policy of each preset."""

    scripts: list[str]
    """NSE scripts that a policy may name."""

    max_addresses: int
    """Maximum number of addresses per subnet."""


class Info(ScanLimits):
    """The settings that a client needs before it has a token; none of them is secret."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_serialization_defaults_required=True)

    version: str
    api: Literal["v1"]
    issuer: str
    """Issuer of the accepted tokens."""

    client_id: str | None
    """Client id at the issuer for sign-in; null if none is registered."""

    audience: str
    scopes: list[str]
    sign_in: list[Literal["token", "oidc"]]
    """`token`: with an existing token of the caller; `oidc`: at the issuer, with `client_id`."""

    sign_in_to_page: list[Literal["token", "oidc"]] = []  # noqa: RUF012 # pydantic copies it
    """The same for the page of this gateway; empty when it has no browser sessions."""


class Quota(Answer):
    """Quota of requests per minute."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int
    left: int
    reset: int
    """Seconds until more requests are permitted."""


class PlacesLeft(Answer):
    """Concurrent requests."""

    limit: int
    left: int


class Limits(Answer):
    """Limits of this user at this replica of the gateway; each replica counts separately."""

    reads: Quota
    writes: Quota
    cancels: Quota
    at_once: PlacesLeft


class Me(Answer):
    """The caller, and the caller's remaining limits."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    user_id: int
    admin: bool
    expires_at: Time
    """Expiry of the token."""

    limits: Limits
