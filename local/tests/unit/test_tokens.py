from __future__ import annotations

import stat
from pathlib import Path

import jwt

from local import tokens


def claims(issuer: tokens.Issuer, token: str) -> dict[str, object]:
    key = issuer.public_key_file.read_bytes()
    decoded: dict[str, object] = jwt.decode(
        token,
        key,
        algorithms=["ES256"],
        issuer=tokens.ISSUER,
        audience=tokens.AUDIENCE,
    )
    return decoded


def test_token_has_its_user_in_sub(tmp_path: Path) -> None:
    """A token is signed with the folder's key, has its user in `sub`, and no role."""
    issuer = tokens.Issuer(tmp_path)
    found = claims(issuer, issuer.token(7))
    assert found["sub"] == "7"
    assert "roles" not in found


def test_token_of_an_administrator_has_the_role(tmp_path: Path) -> None:
    """The token of an administrator has the role `admin`."""
    issuer = tokens.Issuer(tmp_path)
    assert claims(issuer, issuer.token(7, admin=True))["roles"] == ["admin"]


def test_issuer_after_a_restart_uses_the_same_keys(tmp_path: Path) -> None:
    """A token created before a restart is accepted after it."""
    token = tokens.Issuer(tmp_path).token(7)
    assert claims(tokens.Issuer(tmp_path), token)["sub"] == "7"


def test_private_key_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """Only its owner can read the private key."""
    tokens.Issuer(tmp_path)
    assert stat.S_IMODE((tmp_path / "private.pem").stat().st_mode) == 0o600
