"""The credentials of compose: passwords, keys and certificates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from local import keys
from local.credentials import make_service_certificates

PURPOSES = {
    "api-gateway": ExtendedKeyUsageOID.CLIENT_AUTH,
    "job-orchestrator": ExtendedKeyUsageOID.SERVER_AUTH,
    "result-store": ExtendedKeyUsageOID.SERVER_AUTH,
}


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


@pytest.mark.parametrize(("service", "purpose"), PURPOSES.items())
def test_certificate_is_for_one_service_and_one_side(
    tmp_path: Path, service: str, purpose: x509.ObjectIdentifier
) -> None:
    """Each certificate has the service's name and one purpose, and the authority signed it."""
    make_service_certificates(tmp_path)
    own, authority = certificate(tmp_path / service / "tls.crt"), certificate(tmp_path / service / "ca.crt")
    own.verify_directly_issued_by(authority)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    further = [f"{service}-queries"] if service == "job-orchestrator" else []  # processes in Kubernetes
    assert names.get_values_for_type(x509.DNSName) == [service, *further]
    assert list(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
    assert (tmp_path / service / "tls.key").stat().st_mode & 0o777 == 0o600


def test_certificates_are_made_once_and_all_together(tmp_path: Path) -> None:
    """Existing files are kept; if one is missing all are created again, by another authority."""
    make_service_certificates(tmp_path)
    before = (tmp_path / "api-gateway/tls.crt").read_text()
    make_service_certificates(tmp_path)
    assert (tmp_path / "api-gateway/tls.crt").read_text() == before
    (tmp_path / "result-store/tls.key").unlink()
    make_service_certificates(tmp_path)
    assert (tmp_path / "api-gateway/tls.crt").read_text() != before
    authorities = {(tmp_path / service / "ca.crt").read_text() for service in PURPOSES}
    assert len(authorities) == 1


def test_compose_has_certificates_for_years_and_none_for_a_worker(tmp_path: Path) -> None:
    """The volumes of the services that have a part in requests get certificates, which outlive every upgrade."""
    for service in (*PURPOSES, "scanner-worker", "mongodb"):
        (tmp_path / service).mkdir()
    keys.make(tmp_path)
    for service in PURPOSES:
        end = certificate(tmp_path / service / "tls.crt").not_valid_after_utc
        assert end > datetime.now(UTC) + timedelta(days=5 * 365)
    assert not list((tmp_path / "scanner-worker").glob("tls.*"))
