"""TLS with files that may be replaced while the process runs, and mutual TLS between the services.

Between services both sides present a certificate of the site's own authority and check the other's name.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import structlog
from cryptography import x509
from prometheus_client import Gauge

from scanfleet.errors import ConfigurationError
from scanfleet.runtime.settings import TlsSettings

_log = structlog.stdlib.get_logger(__name__)

_EXPIRY: Final = Gauge(
    "scanfleet_certificate_expiry_timestamp_seconds",
    "Earliest expiry of the certificates in use that were read from this file, in seconds since 1970; 0 if unknown",
    ["file"],
)

_Version = tuple[tuple[int, ...], ...]


class FileContext(ssl.SSLContext):
    """A context whose new connections use the certificates that are in its files when the connections begin.

    While the files are unreadable or do not match, the previous content stays in use. Authorities of earlier content remain
    trusted until a restart.
    """

    _authority: Path
    _certificate: tuple[Path, Path] | None
    _label: str
    _version: _Version = ()
    """Of the content in use."""

    _refused: _Version = ()
    """Of content that OpenSSL does not accept."""

    _logged: _Version = ()
    """Of the unusable files that were logged last."""

    @classmethod
    def of(
        cls,
        protocol: ssl._SSLMethod,
        authority: Path,
        certificate: tuple[Path, Path] | None = None,
        *,
        label: str = "authority",
    ) -> Self:
        """Return a context for a protocol.

        Args:
            protocol: for a server, or for a client that checks the server's name.
            authority: the trusted certificates.
            certificate: the own certificate and its key; None for a client without one.
            label: the authority's label in the metric of expiries.

        Raises:
            OSError: a file cannot be read, or has invalid content.
        """
        context = cls(protocol)
        context._authority, context._certificate, context._label = authority, certificate, label
        context._read(context._found())
        return context

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin a connection; asyncio calls this for each one."""
        version = self._found()
        if version not in (self._version, self._refused):
            try:
                self._read(version)
            except OSError as error:  # the base class of OpenSSL's errors
                if isinstance(error, ssl.SSLError):  # any other may be transient
                    self._refused = version
                if version != self._logged:
                    self._logged = version
                    _log.error(
                        "certificate_files_unusable",
                        files=[str(file) for file in self._files()],
                        error=str(error),
                        next_step="the previous content stays in use; replace the certificate and its key together",
                    )
        return super().wrap_bio(*args, **options)

    def _read(self, version: _Version) -> None:
        for context in (ssl.SSLContext(self.protocol), self):  # a failure would leave this one without a key
            context.load_verify_locations(self._authority)
            if self._certificate is not None:
                context.load_cert_chain(*self._certificate)
        self._version = version
        _EXPIRY.labels(self._label).set(_expiry(self._authority))
        if self._certificate is not None:
            _EXPIRY.labels("certificate").set(_expiry(self._certificate[0]))

    def _found(self) -> _Version:
        return tuple(map(_version, self._files()))

    def _files(self) -> tuple[Path, ...]:
        return self._authority, *(self._certificate or ())


def server_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """Return the context of a server that requires a certificate of its authority from every client; None without TLS.

    Raises:
        ConfigurationError: a file cannot be read, or has invalid content.
    """
    return _context(settings, ssl.PROTOCOL_TLS_SERVER)


def client_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """Return the context of a client that presents its certificate and accepts only a server with the name in the URL.

    None without TLS.

    Raises:
        ConfigurationError: see `server_context`.
    """
    return _context(settings, ssl.PROTOCOL_TLS_CLIENT)


def names(certificate: Mapping[str, Any]) -> set[str]:
    """Return the DNS names of a peer's certificate, as `ssl.SSLSocket.getpeercert` returns it."""
    return {name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"}


def _context(settings: TlsSettings, protocol: ssl._SSLMethod) -> ssl.SSLContext | None:
    if settings.tls_ca_file is None or settings.tls_certificate_file is None or settings.tls_key_file is None:
        return None
    try:
        context = FileContext.of(protocol, settings.tls_ca_file, (settings.tls_certificate_file, settings.tls_key_file))
    except OSError as error:
        files = f"{settings.tls_ca_file}, {settings.tls_certificate_file} and {settings.tls_key_file}"
        raise ConfigurationError(f"cannot use {files} for TLS: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both sides support it
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _version(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _expiry(file: Path) -> float:
    try:
        certificates = x509.load_pem_x509_certificates(file.read_bytes())
    except (OSError, ValueError):
        return 0.0
    return min(each.not_valid_after_utc for each in certificates).timestamp()
