"""Settings in composable parts; each service's `settings.py` inherits the ones it needs.

Every value comes from an environment variable, `SCANFLEET_` and the field's name; lists are separated by commas.
"""

from __future__ import annotations

import socket
from ipaddress import IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Final, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from scanfleet.policy import ADMITTED_SCRIPTS, ScriptName
from scanfleet.targets import DEFAULT_MAX_ADDRESSES, NAT64_LENGTHS, Network, TargetRules, parse_network

Algorithm = Literal["RS256", "PS256", "ES256", "EdDSA"]
Claim = Annotated[str, Field(min_length=1, max_length=200)]
"""The name of a claim, or a path to it."""

MAX_LIFE_SECONDS: Final = 30 * 86_400
"""Longest life that a token may be allowed; a revocation is kept for longer."""


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _network(value: object) -> object:
    return parse_network(value) if isinstance(value, str) else value


def _nat64(prefix: IPv6Network) -> IPv6Network:
    if prefix.prefixlen not in NAT64_LENGTHS:
        raise ValueError(
            f"a NAT64 prefix has a length of {', '.join(map(str, sorted(NAT64_LENGTHS)))}, not {prefix.prefixlen}"
        )
    return prefix


Networks = Annotated[tuple[Annotated[Network, BeforeValidator(_network)], ...], NoDecode, BeforeValidator(_split)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Nat64Prefix = Annotated[IPv6Network, BeforeValidator(_network), AfterValidator(_nat64)]


def _https(url: HttpUrl) -> HttpUrl:
    if url.scheme != "https" and not _is_loopback(url.host or ""):
        raise ValueError("is not https: an attacker on the network path could replace the keys")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _secret(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip()  # an editor ends it with a newline


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SCANFLEET_", frozen=True, hide_input_in_errors=True)


class FrontSettings(_Settings):
    """What clients may hold of a service before it has looked at their requests."""

    max_connections: int = Field(
        2_000,  # twice the requests that a gateway serves at once; idle, each costs some 20 kB
        ge=1,
        description="The most connections of all clients. For one more, an idle connection of the client that has most is "
        "closed; if none is idle, it is answered 503.",
    )
    max_connections_per_address: int = Field(
        600,  # more than the 500 connections that a gateway opens to each service behind it
        ge=1,
        description="The most connections of one IPv4 address, or of one IPv6 /64 network; likewise. Behind a proxy, all "
        "clients have the proxy's address.",
    )
    header_seconds: float = Field(
        10.0,  # a client that is alive sends them in one packet
        gt=0,
        description="How long in seconds a new connection may take to send a whole request line and all headers, and a later "
        "request of the same connection from its first byte on.",
    )
    stalled_seconds: float = Field(
        60.0,  # proxies and phones that lose their network are back or gone sooner
        gt=0,
        description="How long in seconds a client may read nothing of an answer before its connection is closed.",
    )
    trusted_proxies: Networks = Field(
        (),
        description="Networks of the proxies before the service. What they report is believed: the caller's address in "
        "`X-Forwarded-For`, of which the last one outside these networks counts, and the trace in `traceparent`.",
    )


class CommonSettings(FrontSettings):
    """What every service has."""

    instance: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name of this process, unique among its service's replicas and the same after a restart.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="The least level that is logged.",
    )
    otlp_endpoint: HttpUrl | None = Field(
        None,
        description="OpenTelemetry collector that gets the traces, by OTLP over HTTP (usually on port 4318); without it there are none.",
    )
    otlp_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the requests that are traced; one that comes with a `traceparent` says itself whether it is.",
    )


class KafkaSettings(_Settings):
    """The way to the bus."""

    kafka: str = Field(
        min_length=1,
        description="Bootstrap servers as `host:port`, separated by commas.",
    )
    kafka_ca_file: Path | None = Field(
        None,
        description="PEM file with the authorities that vouch for the brokers. With it all is said over TLS.",
    )
    kafka_username: str | None = Field(
        None,
        min_length=1,
        description="Who we are to the brokers (SCRAM-SHA-512).",
    )
    kafka_password_file: Path | None = Field(
        None,
        description="File with the password of that name, read once at start.",
    )
    topic_prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,64}$",
        description="Put before the name of every topic and consumer group, so that several platforms can share a broker.",
    )

    @model_validator(mode="after")
    def _name_with_password(self) -> Self:
        if (self.kafka_username is None) != (self.kafka_password_file is None):
            raise ValueError("set both of SCANFLEET_KAFKA_USERNAME and SCANFLEET_KAFKA_PASSWORD_FILE, or neither")
        return self

    @property
    def kafka_password(self) -> str | None:
        """Raises: OSError: the file cannot be read."""
        return _secret(self.kafka_password_file) if self.kafka_password_file else None


class MongoSettings(_Settings):
    """The way to the service's own database. Exactly one of the first two is set."""

    mongodb: str | None = Field(
        None,
        min_length=1,
        repr=False,  # it may hold a password
        description="MongoDB connection URI of a replica set.",
    )
    mongodb_file: Path | None = Field(
        None,
        description="File with that URI, read once at start: for one that holds a password.",
    )
    database: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,38}$",  # what MongoDB allows at most
        description="Name of the service's database; no two services share one.",
    )

    @model_validator(mode="after")
    def _one_uri(self) -> Self:
        if (self.mongodb is None) == (self.mongodb_file is None):
            raise ValueError("set exactly one of SCANFLEET_MONGODB and SCANFLEET_MONGODB_FILE")
        return self

    @property
    def mongodb_uri(self) -> str:
        """Raises: OSError: the file cannot be read."""
        return self.mongodb or _secret(cast(Path, self.mongodb_file))


class AuthSettings(_Settings):
    """Which tokens of users are accepted. Exactly one source of keys is set."""

    jwt_issuer: str = Field(min_length=1, description="The only `iss` that is accepted.")
    jwt_audience: str = Field(min_length=1, description="What the audience claim must be or contain.")
    jwt_audience_claim: Claim = Field(
        "aud", description="Claim that holds the audience; Cognito's access tokens have it in `client_id`."
    )
    jwt_jwks_url: Annotated[HttpUrl, AfterValidator(_https)] | None = Field(
        None,
        description="Where the issuer publishes its public keys (JWKS), by https unless it is on this machine; keys rotate "
        "without a restart.",
    )
    jwt_public_key_file: Path | None = Field(
        None,
        description="PEM file with the issuer's only public key, read once at start.",
    )
    jwt_development_secret: SecretStr | None = Field(
        None,
        min_length=32,  # HS256 needs a key as long as its hash (RFC 7518, 3.2)
        description="Shared secret for HS256 tokens. For development only: every process that can verify a token can make one.",
    )
    jwt_algorithms: Annotated[tuple[Algorithm, ...], NoDecode, BeforeValidator(_split)] = Field(
        ("RS256", "PS256", "ES256", "EdDSA"),
        min_length=1,
        description="Signature algorithms that are accepted; a key is only ever used with those made for its type. `EdDSA` is "
        "Ed25519, under either name.",
    )
    jwt_types: Words = Field(
        ("at+jwt", "JWT"),
        description="Values of the header `typ` that are accepted, in any case; a token without `typ` is accepted too.",
    )
    jwt_max_chars: int = Field(
        14_000,  # with 200 groups a token of Entra has 11,000; the rest of a request's 16 kB is for other headers
        ge=1_000,
        le=64_000,
        description="The most characters of a token. All headers of a request have a limit of their own.",
    )
    jwt_max_life_seconds: int = Field(
        86_400,  # a token that was stolen is of no use tomorrow
        ge=60,
        le=MAX_LIFE_SECONDS,
        description="Longest life (`exp` less `iat`) of a token in seconds; one made for longer is refused. Entra issues some "
        "for up to 28 hours.",
    )
    jwt_leeway_seconds: int = Field(
        10,  # clocks that NTP keeps differ by far less
        ge=0,
        le=60,
        description="By how many seconds the issuer's clock may differ from ours.",
    )
    jwt_user_ids: Literal["claim", "mapped"] = Field(
        "claim",
        description="Where a user's id comes from: `claim` takes it from the token, `mapped` assigns one to each `sub`.",
    )
    jwt_user_claim: Claim = Field(
        "sub",
        description="Claim that holds the user id with `claim`: an integer, or one in a string; a path works too.",
    )
    jwt_roles_claim: Claim = Field(
        "roles",
        description="Claim that holds the roles: a list, a string, the keys of an object, or the words of a `scope`. A path "
        "leads to a nested one: `realm_access.roles`.",
    )
    jwt_admin_role: str = Field("admin", min_length=1, description="Role that makes an administrator.")
    jwt_jwks_cooldown_seconds: int = Field(
        10,  # soon enough for a new key, and no load for an issuer whatever kids callers invent
        ge=1,
        description="Shortest time in seconds between two fetches of the JWKS.",
    )
    jwt_jwks_max_age_seconds: int = Field(
        300,  # a key that the issuer has withdrawn is accepted for at most this long
        ge=1,
        description="Age in seconds after which the JWKS is fetched again.",
    )
    jwt_jwks_max_stale_seconds: int = Field(
        14_400,  # an issuer's outage of an afternoon; an attacker who blocks the fetch to keep a stolen key valid gets no longer
        ge=1,
        description="Age in seconds at which keys end that cannot be fetched again. Then every request is answered 503.",
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
            raise ValueError("SCANFLEET_JWT_JWKS_MAX_STALE_SECONDS is not below SCANFLEET_JWT_JWKS_MAX_AGE_SECONDS")
        return self

    @property
    def _sources(self) -> tuple[object, ...]:
        return self.jwt_jwks_url, self.jwt_public_key_file, self.jwt_development_secret


class InternalTokenSettings(_Settings):
    """Whose requests the services behind the gateway accept."""

    internal_public_keys_file: Path = Field(
        description="PEM file with the gateway's Ed25519 public key, read once at start; while the key is replaced, with the old "
        "and the new one.",
    )


class TargetSettings(_Settings):
    """What may be scanned."""

    allowed_networks: Networks = Field(
        (),
        description="Networks that may be scanned, as CIDRs separated by commas. Nothing may be until they are named.",
    )
    denied_networks: Networks = Field(
        (),
        description="Networks that may not be scanned, whatever is allowed.",
    )
    nat64_prefixes: Annotated[tuple[Nat64Prefix, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Prefixes of the site's own NAT64 (RFC 6052). An address within leads to an IPv4 address, which must be "
        "allowed too.",
    )
    max_addresses: int = Field(
        DEFAULT_MAX_ADDRESSES,
        ge=1,
        description="The most addresses of one subnet.",
    )
    scripts: Annotated[tuple[ScriptName, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Names of further NSE scripts that policies may name; no categories. The workers' nmap must have them, and "
        "[security.md](security.md#scripts) has the risk. Give the orchestrator and the workers the same names.",
    )

    @property
    def target_rules(self) -> TargetRules:
        return TargetRules(self.allowed_networks, self.denied_networks, self.max_addresses, self.nat64_prefixes)

    @property
    def allowed_scripts(self) -> frozenset[str]:
        return ADMITTED_SCRIPTS.union(self.scripts)
