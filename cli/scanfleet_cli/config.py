"""Contexts: URLs of gateways and the sources of their tokens.

current = "prod"

[context.prod]
url = "https://scanfleet.example.com"

[context.local]
url = "http://127.0.0.1:8080"
token_command = ["make", "-s", "-C", "/opt/scanfleet", "token", "USER=7"]
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from scanfleet_cli.errors import CommandError, Exit

LOCK_SECONDS: Final = 60.0  # timeout of waiting for another process that writes, or refreshes tokens
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Context:
    """One entry of the configuration."""

    name: str
    url: str
    token_command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The gateway of a command, and its context if it has one."""

    url: str
    source: str
    """The source of the URL, as text."""

    context: Context | None


class Config:
    """The configuration in `folder`, overridden by the environment.

    Args:
        folder: with `config.toml` and stored tokens.
        environment: of the process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.folder = folder
        self.file = folder / "config.toml"
        self.environment = environment

    @classmethod
    def of_user(cls) -> Config:
        """Load the configuration of the current user."""
        from platformdirs import user_config_path  # noqa: PLC0415 # not for --help

        return cls(user_config_path("scanfleet"))

    @property
    def current(self) -> str:
        """Name of the current context; empty without one.

        Raises:
            CommandError: the file does not have the form of a configuration.
        """
        current: str = self._read().get("current", "")
        return current

    def contexts(self) -> dict[str, Context]:
        """Return all contexts by name.

        Raises:
            CommandError: the file does not have the form of a configuration.
        """
        entries = self._read().get("context", {})
        return {name: self._context(name, entry) for name, entry in entries.items()}

    def _context(self, name: str, entry: Any) -> Context:
        url = entry.get("url") if isinstance(entry, dict) else None
        command = entry.get("token_command", []) if isinstance(entry, dict) else None
        if not isinstance(url, str):
            raise CommandError(f"{self.file}: context {name} is not a table with a url that is text")
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise CommandError(f"{self.file}: the token_command of context {name} is not a list of texts")
        return Context(name, url, tuple(command))

    def endpoint(self, url: str | None = None, name: str | None = None) -> Endpoint:
        """Return the gateway to use: of an option, else of the environment, else of the current context.

        Args:
            url: value of --url.
            name: value of --context.

        Raises:
            CommandError: no gateway is configured, or the context does not exist.
        """
        contexts = self.contexts()
        named = name or self.environment.get("SCANFLEET_CONTEXT") or ""
        if named and named not in contexts:
            raise CommandError(f"context {named} does not exist", hint=f"contexts: {', '.join(contexts) or 'none'}")
        given = url or ("" if name else self.environment.get("SCANFLEET_URL", ""))
        context = contexts.get(named or self.current)
        if given:
            checked = check_url(given)
            source = "the option --url" if url else "SCANFLEET_URL"
            # The token of a context is sent only to the gateway of that context.
            same = [each for each in (context, *contexts.values()) if each is not None and same_url(each.url, given)]
            return Endpoint(checked, source, same[0] if same else None)
        if context is None:
            raise CommandError(
                "no gateway is configured",
                hint="scanfleet login URL, or scanfleet context add NAME --url URL, or set SCANFLEET_URL",
            )
        return Endpoint(check_url(context.url), f'context "{context.name}" in {self.file}', context)

    def add(self, context: Context, *, use: bool) -> None:
        """Add or replace a context; comments in the file are preserved."""
        with self._changed() as document:
            entry = document.setdefault("context", _table()).setdefault(context.name, {})
            entry["url"] = context.url
            if context.token_command:
                entry["token_command"] = list(context.token_command)
            else:
                entry.pop("token_command", None)
            if use or "current" not in document:
                document["current"] = context.name

    def use(self, name: str) -> None:
        """Make a context the current one.

        Raises:
            CommandError: it does not exist.
        """
        with self._changed() as document:
            self.known(name)
            document["current"] = name

    def remove(self, name: str) -> None:
        """Remove a context.

        Raises:
            CommandError: it does not exist.
        """
        with self._changed() as document:
            self.known(name)
            del document["context"][name]
            if document.get("current") == name:
                del document["current"]

    def known(self, name: str) -> Context:
        """Return the context of this name.

        Raises:
            CommandError: it does not exist.
        """
        contexts = self.contexts()
        if name not in contexts:
            raise CommandError(
                f"context {name} does not exist", Exit.NOT_FOUND, hint=f"contexts: {', '.join(contexts) or 'none'}"
            )
        return contexts[name]

    def _read(self) -> dict[str, Any]:
        try:
            found = tomllib.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CommandError(f"cannot read {self.file}: {error}") from error
        if not isinstance(found.get("current", ""), str):
            raise CommandError(f'{self.file}: current is not the name of a context, such as current = "prod"')
        if not isinstance(found.get("context", {}), dict):
            raise CommandError(f"{self.file}: context is not a table, such as [context.prod]")
        return found

    @contextmanager
    def _changed(self) -> Iterator[Any]:
        """Return the document to change; it is written at the end of the block."""
        import tomlkit  # noqa: PLC0415 # only to write

        with locked(self.folder / "config.lock"):
            self.contexts()  # an invalid file is reported, not rewritten
            document = tomlkit.parse(self.file.read_text(encoding="utf-8") if self.file.exists() else "")
            yield document
            self._write(document)

    def _write(self, document: Any) -> None:
        import tomlkit  # noqa: PLC0415 # as above

        # "current" belongs to no table, so it must precede the first one.
        if "current" in document and next(iter(document)) != "current":
            current = document.pop("current")
            rest = tomlkit.dumps(document)
            text = f"{tomlkit.dumps({'current': current})}\n{rest}"
        else:
            text = tomlkit.dumps(document)
        write_private(self.file, text)


def _table() -> Any:
    import tomlkit  # noqa: PLC0415 # as above

    return tomlkit.table(is_super_table=True)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, so that only one process at a time reads and replaces the file it protects.

    Raises:
        CommandError: another process holds it for too long, or it cannot be written.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 # only to write

    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = FileLock(file, timeout=LOCK_SECONDS).acquire()
    except Timeout as error:
        raise CommandError(f"another process holds {file}", Exit.FAULT) from error
    except OSError as error:
        raise _unwritable(file, error) from error
    with held:
        yield


def write_private(file: Path, text: str) -> None:
    """Replace a file atomically, with mode 0600.

    Raises:
        CommandError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        number, new = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with open(number, "w", encoding="utf-8") as opened:  # noqa: PTH123 # a descriptor
                opened.write(text)
            Path(new).replace(file)
        except BaseException:
            Path(new).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> CommandError:
    """Return the error for a file that cannot be written."""
    return CommandError(
        f"cannot write {file}: {error.strerror or error}",
        Exit.FAULT,
        hint="set XDG_CONFIG_HOME to a folder that can be written, or use SCANFLEET_URL and SCANFLEET_TOKEN",
    )


def check_url(url: str) -> str:
    """Return `url` without a trailing slash.

    Raises:
        CommandError: it is not an http(s) URL.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in _PORTS and parts.hostname and parts.port != 0
    except ValueError:  # an invalid port or IPv6 address
        known = False
    if not known:
        raise CommandError(f"{url} is not the URL of a gateway", hint="for example https://scanfleet.example.com")
    return url.rstrip("/")


def same_url(one: str, other: str) -> bool:
    """Compare URLs, ignoring the case of scheme and host, the default port, and a trailing slash."""
    return _parts(one) == _parts(other)


def _parts(url: str) -> tuple[str, str | None, int | None, str, str]:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:  # an invalid port or IPv6 address: equal to itself only
        return "", None, None, url, ""
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/"), parts.query


def is_loopback(url: str) -> bool:
    """Return whether a URL is on this machine, so that it needs no TLS."""
    return urlsplit(url).hostname in _LOOPBACK
