"""Tokens: printed by a command of the user, or stored after a sign-in and refreshed before they expire."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from scanfleet_cli.config import locked, same_url, write_private
from scanfleet_cli.errors import CommandError, Exit, UnavailableError

SERVICE: Final = "scanfleet"  # name of the entries in a keyring
EARLY_SECONDS: Final = 60.0  # time before its expiry at which a token is renewed
COMMAND_TIMEOUT_SECONDS: Final = 60.0  # a token command may prompt the user
_TOKEN: Final = re.compile("[\x21-\x7e]+")


def checked(token: str, source: str) -> str:
    """Return a token that a header can carry.

    Args:
        token: to check; the error does not contain it.
        source: of the token, as text.

    Raises:
        CommandError: it is empty, or has characters that no token has.
    """
    if _TOKEN.fullmatch(token):
        return token
    problem = "has spaces, line breaks or other characters that no token has" if token else "is empty"
    raise CommandError(
        f"no token in {source}: the text {problem}", Exit.NOT_ALLOWED, hint="it must be the token and nothing else"
    )


class CommandToken:
    """The token that a command of the user prints; the command runs again when the token expires or was rejected.

    Args:
        command: program and arguments.
        source: of the command, as text.
    """

    def __init__(self, command: Sequence[str], source: str) -> None:
        self._command = command
        self._source = source
        self._token = ""
        # Only one of several concurrent requests runs the command, which may prompt the user.
        self._lock = threading.Lock()

    def current(self) -> str:
        """Return the token to send now. The command may fail while the last token has not expired.

        Raises:
            CommandError: the command failed, or did not print a token.
        """
        with self._lock:
            ends = expiry(self._token)
            if not self._token or (ends is not None and time.time() > ends - EARLY_SECONDS):
                try:
                    self._token = self._run()
                except CommandError:
                    if ends is None or time.time() >= ends:
                        raise
            return self._token

    def refused(self, token: str) -> None:
        """Discard this token, so that the next request runs the command again."""
        with self._lock:
            if token == self._token:
                self._token = ""

    def _run(self) -> str:
        shown = " ".join(self._command)
        try:
            done = subprocess.run(  # noqa: S603 # the user's own configuration names it
                self._command, stdout=subprocess.PIPE, text=True, timeout=COMMAND_TIMEOUT_SECONDS, check=True
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise CommandError(f"the token command failed: {error}", Exit.NOT_ALLOWED, hint=shown) from error
        return checked(done.stdout.strip(), self._source)


def expiry(token: str) -> float | None:
    """Return the Unix time at which a JWT expires, None if it has none. The token is not verified: the service does that."""
    try:
        claims: Any = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        return float(claims["exp"])
    except (ValueError, LookupError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one sign-in."""

    url: str
    """URL of the gateway; the tokens are sent to no other."""

    access_token: str
    expires_at: float | None = None
    """Unix time; None if the issuer does not state it."""

    refresh_token: str | None = None
    token_endpoint: str | None = None
    client_id: str | None = None

    def lasts(self, seconds: float = 0.0) -> bool:
        """Return whether the access token is valid for more than these seconds, as far as its end is known."""
        return self.expires_at is None or time.time() < self.expires_at - seconds

    def renewed(self, answer: dict[str, Any]) -> Tokens:
        """Return these tokens with the values of the issuer's response.

        Raises:
            CommandError: it has no access token.
        """
        token, ends = answer.get("access_token"), answer.get("expires_at")
        if not isinstance(token, str):
            raise CommandError("the response of the issuer has no access token", Exit.FAULT)
        return replace(
            self,
            access_token=token,
            expires_at=ends if isinstance(ends, int | float) else expiry(token),
            refresh_token=answer.get("refresh_token") or self.refresh_token,
        )


class Store(Protocol):
    """Stores the tokens of each context."""

    def where(self, name: str) -> str:
        """Return where the tokens of a context are, as text."""

    def read(self, name: str) -> str | None: ...

    def write(self, name: str, text: str) -> None: ...

    def delete(self, name: str) -> None: ...


class FileStore:
    """Tokens in a file with mode 0600."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def where(self, _name: str) -> str:
        return f"the file {self._file}, which only you can read"

    def read(self, name: str) -> str | None:
        return self._all().get(name)

    def write(self, name: str, text: str) -> None:
        write_private(self._file, json.dumps(self._all() | {name: text}))

    def delete(self, name: str) -> None:
        every = self._all()
        if every.pop(name, None) is not None:
            write_private(self._file, json.dumps(every))

    def _all(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CommandError(
                f"cannot read {self._file}: {error}", Exit.NOT_ALLOWED, hint="scanfleet login"
            ) from error
        return found


class KeyringStore:
    """Tokens in the keyring of the system, through the optional package keyring; in a file if it does not store them.

    Args:
        keyring: the package.
        file: has the tokens that the keyring did not store, for example because it is locked.
    """

    def __init__(self, keyring: Any, file: FileStore) -> None:
        self._keyring = keyring
        self._file = file

    def where(self, name: str) -> str:
        return "the system keyring" if self._file.read(name) is None else self._file.where(name)

    def read(self, name: str) -> str | None:
        if (found := self._file.read(name)) is None:
            with self._usable():
                found = self._keyring.get_password(SERVICE, name)
        return found

    def write(self, name: str, text: str) -> None:
        try:
            self._keyring.set_password(SERVICE, name, text)
        except self._keyring.errors.KeyringError:
            self._file.write(name, text)
        else:
            self._file.delete(name)

    def delete(self, name: str) -> None:
        self._file.delete(name)
        with self._usable():
            if self._keyring.get_password(SERVICE, name) is not None:
                self._keyring.delete_password(SERVICE, name)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except self._keyring.errors.KeyringError as error:
            raise CommandError(
                f"cannot use the system keyring: {error}",
                Exit.NOT_ALLOWED,
                hint="unlock it, or set SCANFLEET_TOKEN or SCANFLEET_TOKEN_FILE",
            ) from error


def store_in(folder: Path) -> Store:
    """Return the keyring if this machine has a usable one, else a file in `folder`."""
    file = FileStore(folder / "tokens.json")
    try:
        import keyring  # noqa: PLC0415 # an optional package, and slow to import
        from keyring.backends.fail import Keyring as NoKeyring  # noqa: PLC0415 # as above
    except ImportError:
        return file
    return file if isinstance(keyring.get_keyring(), NoKeyring) else KeyringStore(keyring, file)


class StoredTokens:
    """The stored tokens of every context.

    Args:
        folder: of the configuration, with the lock file and, without a keyring, the token file.
        store: keyring or file; by default that of `store_in`.
        transport: HTTP transport of requests to the issuer; the network by default.
    """

    def __init__(self, folder: Path, store: Store | None = None, transport: Any = None) -> None:
        self.store = store or store_in(folder)
        self._folder = folder
        self._transport = transport

    def read(self, name: str, url: str) -> Tokens | None:
        """Return the tokens of a context for the gateway at `url`, None if there are none."""
        text = self.store.read(name)
        if text is None:
            return None
        try:
            tokens = Tokens(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise CommandError(
                f"cannot read the tokens in {self.store.where(name)}", Exit.NOT_ALLOWED, hint="scanfleet login"
            ) from error
        return tokens if same_url(tokens.url, url) else None

    def keep(self, name: str, tokens: Tokens) -> None:
        with self._locked():
            self._write(name, tokens)

    def delete(self, name: str) -> None:
        with self._locked():
            self.store.delete(name)

    def current(self, name: str, url: str, refused: str = "") -> str | None:
        """Return an access token, refreshed a minute before it expires; None if there is none for this gateway.

        Args:
            name: of the context.
            url: of the gateway.
            refused: a token that the gateway rejected; it is refreshed too.

        Raises:
            CommandError: it has expired, or the issuer refused to refresh it.
            UnavailableError: it has expired, and the issuer is unavailable.
        """

        def current(tokens: Tokens | None) -> bool:
            return tokens is None or (tokens.lasts(EARLY_SECONDS) and tokens.access_token != refused)

        if not current(tokens := self.read(name, url)):
            # A refresh token may be valid once, so one of several processes refreshes, and the others read the new tokens.
            with self._locked():
                tokens = self.read(name, url)  # None after a logout in the meantime
                if tokens is not None and not current(tokens):
                    tokens = self._refreshed(tokens, rejected=tokens.access_token == refused)
                    self._write(name, tokens)
        return tokens.access_token if tokens is not None else None

    def _refreshed(self, tokens: Tokens, *, rejected: bool) -> Tokens:
        """Return new tokens; the same ones if they cannot be replaced now and are still valid."""
        if not tokens.refresh_token or not tokens.token_endpoint:
            if tokens.lasts():
                return tokens
            raise CommandError("the token has expired", Exit.NOT_ALLOWED, hint=f"scanfleet login {tokens.url}")
        from scanfleet_cli.login import refresh  # noqa: PLC0415 # only when a token ends

        try:
            return refresh(tokens, self._transport)
        except UnavailableError:
            if rejected or not tokens.lasts():
                raise
        return tokens

    def _write(self, name: str, tokens: Tokens) -> None:
        self.store.write(name, json.dumps(asdict(tokens)))

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self._folder / "tokens.lock")
