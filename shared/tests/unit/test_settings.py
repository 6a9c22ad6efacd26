"""Settings come from the environment, in one spelling, and are checked before anything starts."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from pydantic import ValidationError

from scanfleet.runtime.settings import AuthSettings, CommonSettings, KafkaSettings, MongoSettings, TargetSettings


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is read from one variable, separated by commas, spaces around them or not."""
    monkeypatch.setenv("SCANFLEET_ALLOWED_NETWORKS", "127.0.0.0/8, ::1")
    monkeypatch.setenv("SCANFLEET_DENIED_NETWORKS", "")
    settings = TargetSettings()
    assert settings.allowed_networks == (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
    assert settings.denied_networks == ()


def test_default_settings_refuse_every_target() -> None:
    """Without a setting every target is refused."""
    assert TargetSettings().target_rules.refusal(IPv4Network("127.0.0.1/32"))


def test_rules_are_made_of_the_settings() -> None:
    """Allowed and denied networks and the size limit make the rules."""
    settings = TargetSettings.model_validate(
        {
            "allowed_networks": "127.0.0.0/8,2001:db8::/32",
            "denied_networks": "127.1.0.0/16",
            "max_addresses": 256,
            "nat64_prefixes": "2001:db8:64::/96, 2001:db8:65::/64",
        },
    )
    assert settings.target_rules.refusal(IPv4Network("127.9.8.0/24")) is None
    assert settings.target_rules.refusal(IPv4Network("127.1.0.0/24"))
    assert settings.target_rules.refusal(IPv4Network("127.9.0.0/16"))
    assert settings.target_rules.refusal(IPv6Network("2001:db8:64::7f09:0/120")) is None
    assert settings.target_rules.refusal(IPv6Network("2001:db8:64::7f01:0/120"))


@pytest.mark.parametrize("network", ["127.0.0.1/8", "127.1", "0x7f000001", "localhost", "127.0.0.0/33", "2130706433"])
def test_misspelt_network_prevents_the_start(network: str) -> None:
    """An allowed or denied network in a non-canonical spelling is refused, so that a list means what it appears to."""
    for field in ("allowed_networks", "denied_networks"):
        with pytest.raises(ValidationError):
            TargetSettings.model_validate({field: f"10.0.0.0/8,{network}"})


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (CommonSettings, {"instance": "a b"}),
        (CommonSettings, {"log_level": "loud"}),
        (KafkaSettings, {}),
        (KafkaSettings, {"kafka": ""}),
        (KafkaSettings, {"kafka": "h:1", "topic_prefix": "a/b"}),
        (KafkaSettings, {"kafka": "h:1", "kafka_username": "u"}),
        (KafkaSettings, {"kafka": "h:1", "kafka_password_file": "/secrets/password"}),
        (KafkaSettings, {"kafka": "h:1", "kafka_username": "", "kafka_password_file": "/secrets/password"}),
        (MongoSettings, {"mongodb": "mongodb://h"}),
        (MongoSettings, {"database": "d"}),
        (MongoSettings, {"mongodb": "mongodb://h", "mongodb_file": "/secrets/uri", "database": "d"}),
        (MongoSettings, {"mongodb": "mongodb://h", "database": "a.b"}),
        (TargetSettings, {"max_addresses": 0}),
        (TargetSettings, {"nat64_prefixes": "2001:db8::/65"}),
        (TargetSettings, {"nat64_prefixes": "192.0.2.0/24"}),
        (
            AuthSettings,
            {"jwt_issuer": "i", "jwt_audience": "a", "jwt_jwks_url": "https://i/", "jwt_algorithms": "HS256"},
        ),
        (
            AuthSettings,
            {"jwt_issuer": "i", "jwt_audience": "a", "jwt_jwks_url": "https://i/", "jwt_algorithms": "none"},
        ),
        (AuthSettings, {"jwt_issuer": "i", "jwt_audience": "a", "jwt_jwks_url": "https://i/", "jwt_algorithms": ""}),
        (AuthSettings, {"jwt_issuer": "", "jwt_audience": "a", "jwt_jwks_url": "https://i/"}),
        (AuthSettings, {"jwt_issuer": "i", "jwt_audience": "a", "jwt_jwks_url": "file:///etc/passwd"}),
    ],
)
def test_invalid_setting_prevents_the_start(settings: type[CommonSettings], values: dict[str, object]) -> None:
    """A setting that is missing or invalid is refused."""
    with pytest.raises(ValidationError):
        settings.model_validate(values)


def test_secret_is_read_from_its_file(tmp_path: Path) -> None:
    """A file contains the secret, with or without a final newline, and is read when it is needed."""
    for number, ending in enumerate(("", "\n", "\r\n")):
        secret = tmp_path / str(number)
        kafka = KafkaSettings(kafka="h:1", kafka_username="u", kafka_password_file=secret)
        mongo = MongoSettings(mongodb_file=secret, database="d")
        with pytest.raises(FileNotFoundError, match=str(secret)):
            _ = kafka.kafka_password
        secret.write_bytes(f"Sesame 99{ending}".encode())
        assert (kafka.kafka_password, mongo.mongodb_uri) == ("Sesame 99", "Sesame 99")
    assert KafkaSettings(kafka="h:1").kafka_password is None
    assert MongoSettings(mongodb="mongodb://h", database="d").mongodb_uri == "mongodb://h"


def test_secrets_do_not_show() -> None:
    """Neither a settings object nor an error about one shows a password or secret."""
    secret = "Sesame99" * 4  # a made-up one
    auth = AuthSettings.model_validate({"jwt_issuer": "i", "jwt_audience": "a", "jwt_development_secret": secret})
    mongo = MongoSettings(mongodb=f"mongodb://u:{secret}@h/", database="d")
    with pytest.raises(ValidationError) as caught:
        MongoSettings.model_validate({"mongodb": f"mongodb://u:{secret}@h/", "database": secret + "."})
    assert secret not in f"{auth!r}{mongo!r}{caught.value}"
