"""Composable settings classes; each service's `settings.py` inherits from those it needs.

Every value is read from the environment variable `SCANFLEET_<FIELD>`; lists are comma-separated.
"""

from __future__ import annotations

import socket
from ipaddress import IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Final, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from scanfleet.contracts.user_grants import UserGrants
from scanfleet.scanning.policy import ADMITTED_SCRIPTS, ScriptName
from scanfleet.scanning.targets import DEFAULT_MAX_ADDRESSES, FROM_TEXT, NAT64_LENGTHS, ParsedNetwork, TargetRules

Algorithm = Literal["RS256", "PS256", "ES256", "EdDSA"]
Claim = Annotated[str, Field(min_length=1, max_length=200)]
"""Name of a claim, or path to a nested one."""

MAX_LIFE_SECONDS: Final = 30 * 86_400
"""Upper bound of the configurable token lifetime; revocations are kept for longer."""


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _nat64(prefix: IPv6Network) -> IPv6Network:
    if prefix.prefixlen not in NAT64_LENGTHS:
        raise ValueError(
            f"a NAT64 prefix has a length of {', '.join(map(str, sorted(NAT64_LENGTHS)))}, not {prefix.prefixlen}"
        )
    return prefix


Networks = Annotated[tuple[ParsedNetwork, ...], NoDecode, BeforeValidator(_split)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Nat64Prefix = Annotated[IPv6Network, FROM_TEXT, AfterValidator(_nat64)]


def _https(url: HttpUrl) -> HttpUrl:
    if not is_authentic(str(url)):
        raise ValueError("is not https: an attacker on the network path could replace the keys")
    return url


def is_authentic(url: str) -> bool:
    """Return whether responses from this URL cannot be replaced on the network path: it is https, or http on this machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    host = parts.hostname or ""
    return (parts.scheme == "https" and host != "") or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_secret(file: Path) -> str:
    """Return the secret in a file.

    Raises:
        OSError: the file cannot be read.
    """
    return file.read_text(encoding="utf-8").strip()  # editors append a newline


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SCANFLEET_", frozen=True, hide_input_in_errors=True)


class ConnectionSettings(_Settings):
    """Limits on connections and on requests that are not complete yet."""

    max_connections: int = Field(
        3_000,  # more than a gateway's requests, cancels and streams together; an idle connection costs about 15 kB
        ge=1,
        description="Maximum number of connections, TLS handshakes in progress included. At the limit the server "
        "closes an idle connection of the client with the most connections, else that client's longest-unread "
        "connection; if there is neither, it rejects the new connection with 503.",
    )
    max_connections_per_address: int = Field(
        600,  # more than the 500 connections of a gateway to each internal service
        ge=1,
        description="Maximum number of connections per IPv4 address or IPv6 /64 network, enforced in the same way. "
        "It does not apply to trusted proxies.",
    )
    header_seconds: float = Field(
        10.0,  # normal clients send them in one packet
        gt=0,
        description="Timeout in seconds for the request line and headers: from the start of the connection, and for "
        "later requests of the connection from their first byte.",
    )
    stalled_seconds: float = Field(
        60.0,  # proxies and mobile clients that lose their network reconnect or disappear sooner
        gt=0,
        description="Write timeout in seconds: the server closes a connection whose client reads no part of a "
        "response for this time.",
    )
    trusted_proxies: Networks = Field(
        (),
        description="Networks of trusted proxies in front of the service. Their `X-Forwarded-For` determines the "
        "caller's address (the last one outside these networks), and their `traceparent` the trace.",
    )


class ServerSettings(ConnectionSettings):
    """Addresses and ports of a service."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that the service listens on; the images set `0.0.0.0`.",
    )
    probe_port: int = Field(
        8081,
        ge=0,
        le=65_535,
        description="Port for `/healthz`, `/readyz` and `/metrics`, without TLS and without tokens. With 0 the "
        "operating system chooses a free port.",
    )


class ApiSettings(_Settings):
    """Port of a service's routes."""

    api_port: int = Field(
        8080, ge=0, le=65_535, description="Port for requests. With 0 the operating system chooses a free port."
    )


class TlsSettings(_Settings):
    """Mutual TLS between the services. All three are set, or none."""

    tls_ca_file: Path | None = Field(
        None,
        description="PEM file with the authority that signs the services' certificates. If set, services use "
        "mutual TLS between each other; otherwise they use clear text.",
    )
    tls_certificate_file: Path | None = Field(
        None,
        description="PEM file with the service's own certificate, which has the service's name as a DNS name. New connections use "
        "replaced files without a restart.",
    )
    tls_key_file: Path | None = Field(
        None,
        description="PEM file with the key of that certificate.",
    )

    @model_validator(mode="after")
    def _all_files_or_none(self) -> Self:
        files = (self.tls_ca_file, self.tls_certificate_file, self.tls_key_file)
        if len({file is None for file in files}) > 1:
            raise ValueError(
                "set all of SCANFLEET_TLS_CA_FILE, SCANFLEET_TLS_CERTIFICATE_FILE and SCANFLEET_TLS_KEY_FILE, or none"
            )
        return self


class CommonSettings(ServerSettings):
    """Settings of every service."""

    instance: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name of this process, unique among its service's replicas and the same after a restart.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Minimum log level.",
    )
    otlp_endpoint: HttpUrl | None = Field(
        None,
        description="OpenTelemetry collector for traces, by OTLP over HTTP (usually port 4318). Without it, tracing "
        "is disabled.",
    )
    otlp_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Fraction of requests to trace; requests with a trusted `traceparent` follow its sampled flag.",
    )


class KafkaSettings(_Settings):
    """Kafka connection."""

    kafka: str = Field(
        min_length=1,
        description="Bootstrap servers as comma-separated `host:port`.",
    )
    kafka_ca_file: Path | None = Field(
        None,
        description="PEM file with the certificate authorities of the brokers. If set, connections use TLS. "
        "New connections use a replaced file without a restart.",
    )
    kafka_username: str | None = Field(
        None,
        min_length=1,
        description="SASL username (SCRAM-SHA-512).",
    )
    kafka_password_file: Path | None = Field(
        None,
        description="File with the SASL password, read once at start.",
    )
    topic_prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,64}$",
        description="Prefix of every topic and consumer group, so that several platforms can share a cluster.",
    )

    @model_validator(mode="after")
    def _name_with_password(self) -> Self:
        if (self.kafka_username is None) != (self.kafka_password_file is None):
            raise ValueError("set both SCANFLEET_KAFKA_USERNAME and SCANFLEET_KAFKA_PASSWORD_FILE, or neither")
        return self

    @property
    def kafka_password(self) -> str | None:
        """Raises: OSError: the file cannot be read."""
        return read_secret(self.kafka_password_file) if self.kafka_password_file else None


class MongoSettings(_Settings):
    """MongoDB connection of the service's own database. Exactly one of the first two is set."""

    mongodb: str | None = Field(
        None,
        min_length=1,
        repr=False,  # may contain a password
        description="MongoDB connection URI of a replica set.",
    )
    mongodb_file: Path | None = Field(
        None,
        description="File with that URI, read once at start; for a URI with a password.",
    )
    database: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,38}$",  # MongoDB's maximum
        description="Name of the service's database; services must not share one.",
    )

    @model_validator(mode="after")
    def _one_uri(self) -> Self:
        if (self.mongodb is None) == (self.mongodb_file is None):
            raise ValueError("set exactly one of SCANFLEET_MONGODB and SCANFLEET_MONGODB_FILE")
        return self

    @property
    def mongodb_uri(self) -> str:
        """Raises: OSError: the file cannot be read."""
        return self.mongodb or read_secret(cast(Path, self.mongodb_file))


class DeletionSettings(_Settings):
    """Pace of deletions."""

    deletes_per_second: int = Field(
        2_000,  # their cost for the database is a fraction of that of dispatching and storing
        ge=100,
        description="Maximum number of documents of deleted jobs that one replica deletes per second.",
    )


class AuthSettings(_Settings):
    """Verification of users' tokens. Exactly one source of keys is set."""

    jwt_issuer: str = Field(
        min_length=1,
        description="The only accepted `iss`; for sign-in to the page an https URL, or one on this machine.",
    )
    jwt_audience: str = Field(
        min_length=1, description="Required audience: the value, or one of the values, of the audience claim."
    )
    jwt_audience_claim: Claim = Field(
        "aud", description="Claim with the audience; Cognito's access tokens use `client_id`."
    )
    jwt_jwks_url: Annotated[HttpUrl, AfterValidator(_https)] | None = Field(
        None,
        description="URL of the issuer's public keys (JWKS); https unless it is on this machine. Key rotation needs "
        "no restart.",
    )
    jwt_public_key_file: Path | None = Field(
        None,
        description="PEM file with the issuer's only public key, read once at start.",
    )
    jwt_development_secret: SecretStr | None = Field(
        None,
        min_length=32,  # HS256 needs a key as long as its hash (RFC 7518, 3.2)
        description="Shared secret for HS256 tokens. Development only: every process that can verify a token can also "
        "create one.",
    )
    jwt_algorithms: Annotated[tuple[Algorithm, ...], NoDecode, BeforeValidator(_split)] = Field(
        ("RS256", "PS256", "ES256", "EdDSA"),
        min_length=1,
        description="Accepted signature algorithms; a key is used only with the algorithms of its type, and an "
        "RSA key only if it has at least 2,048 bits. `EdDSA` is Ed25519, under either name.",
    )
    jwt_types: Words = Field(
        ("at+jwt", "JWT"),
        description="Accepted values of the header `typ`, case-insensitive; a token without `typ` is accepted too.",
    )
    jwt_max_chars: int = Field(
        14_000,  # an Entra token with 200 groups has 11,000; the rest of the 16 kB is for other headers
        ge=1_000,
        le=64_000,
        description="Maximum length of a token in characters. The headers of a request have a separate limit in total.",
    )
    jwt_max_life_seconds: int = Field(
        86_400,  # limits the use of a stolen token to a day
        ge=60,
        le=MAX_LIFE_SECONDS,
        description="Maximum lifetime (`exp` minus `iat`) of a token in seconds; tokens with a longer one are "
        "rejected. Entra issues some for up to 28 hours.",
    )
    jwt_leeway_seconds: int = Field(
        10,  # clocks that NTP keeps differ by far less
        ge=0,
        le=60,
        description="Maximum clock difference to the issuer in seconds.",
    )
    jwt_user_ids: Literal["claim", "mapped"] = Field(
        "claim",
        description="Source of user ids: `claim` reads them from the token, `mapped` assigns one to each `sub`.",
    )
    jwt_user_claim: Claim = Field(
        "sub",
        description="Claim with the user id if `claim`: an integer or a string of digits; may be a path.",
    )
    jwt_roles_claim: Claim = Field(
        "roles",
        description="Claim with the roles: a list, a string, the keys of an object, or the words of a `scope`. A path "
        "selects a nested claim: `realm_access.roles`.",
    )
    jwt_admin_role: str = Field("admin", min_length=1, description="Role of administrators.")
    jwt_jwks_cooldown_seconds: int = Field(
        10,  # soon enough for a new key; limits the issuer's load from invented key ids
        ge=1,
        description="Minimum interval in seconds between two fetches of the JWKS.",
    )
    jwt_jwks_max_age_seconds: int = Field(
        300,  # the maximum time for which a withdrawn key is still accepted
        ge=1,
        description="Age in seconds after which the JWKS is refetched.",
    )
    jwt_jwks_max_stale_seconds: int = Field(
        14_400,  # bridges an outage of hours; bounds an attacker who blocks the fetch to keep a stolen key valid
        ge=1,
        description="Maximum age in seconds of keys that cannot be refetched. After that, every request is rejected "
        "with 503.",
    )

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        if sum(source is not None for source in self._sources) != 1:
            raise ValueError(
                "set exactly one of SCANFLEET_JWT_JWKS_URL, SCANFLEET_JWT_PUBLIC_KEY_FILE and "
                "SCANFLEET_JWT_DEVELOPMENT_SECRET",
            )
        return self

    @model_validator(mode="after")
    def _ages_in_order(self) -> Self:
        if self.jwt_jwks_max_stale_seconds < self.jwt_jwks_max_age_seconds:
            raise ValueError("SCANFLEET_JWT_JWKS_MAX_STALE_SECONDS must be at least SCANFLEET_JWT_JWKS_MAX_AGE_SECONDS")
        return self

    @property
    def _sources(self) -> tuple[object, ...]:
        return self.jwt_jwks_url, self.jwt_public_key_file, self.jwt_development_secret


class InternalApiSettings(ApiSettings, TlsSettings):
    """Requests that the services behind the gateway accept."""

    internal_public_keys_file: Path = Field(
        description="PEM file with the gateway's Ed25519 public key, read once at start; during a key rotation with "
        "the old and the new one.",
    )


class TargetSettings(_Settings):
    """Rules for scan targets."""

    allowed_networks: Networks = Field(
        (),
        description="Networks that may be scanned, as comma-separated CIDRs. The default allows none.",
    )
    denied_networks: Networks = Field(
        (),
        description="Networks that must not be scanned; takes precedence over the allowed networks.",
    )
    nat64_prefixes: Annotated[tuple[Nat64Prefix, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Prefixes of the site's own NAT64 (RFC 6052). The IPv4 address embedded in an address within them "
        "must be allowed too.",
    )
    max_addresses: int = Field(
        DEFAULT_MAX_ADDRESSES,
        ge=1,
        description="Maximum number of addresses per subnet.",
    )
    scripts: Annotated[tuple[ScriptName, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Names of additional NSE scripts that policies may use; no categories. The workers' nmap must "
        "have them; see [security.md](security.md#scripts) for the risk. Use the same value for the orchestrator and "
        "the workers.",
    )

    @property
    def target_rules(self) -> TargetRules:
        return TargetRules(self.allowed_networks, self.denied_networks, self.max_addresses, self.nat64_prefixes)

    @property
    def allowed_scripts(self) -> frozenset[str]:
        return ADMITTED_SCRIPTS.union(self.scripts)


class GrantSettings(_Settings):
    """Limits of each user's scans."""

    grants_file: Path | None = Field(
        None,
        description="TOML file with the networks, rate, timing, scripts and hours that each user may use, read once "
        "at start; without it all users have the same limits. [security.md](security.md#grants) describes its format. "
        "The gateway, the orchestrator and the workers need the same file.",
    )

    @property
    def user_grants(self) -> UserGrants | None:
        """The user grants; None without a file.

        Raises:
            ValueError: the content of the file is invalid.
            OSError: the file cannot be read.
        """
        if self.grants_file is None:
            return None
        try:
            return UserGrants.parse(self.grants_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.grants_file} (SCANFLEET_GRANTS_FILE): {error}") from error
