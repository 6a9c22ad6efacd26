"""The state that one run of the command shares: gateway, token, output and options."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TextIO, TypeVar

import click

from scanfleet_cli.config import Config, Endpoint
from scanfleet_cli.errors import ApiError, CommandError, Exit
from scanfleet_cli.output import Column, Format, Kind, Output, Row, fields_of, printable

if TYPE_CHECKING:
    from scanfleet_cli.calls import Call, ListCall
    from scanfleet_cli.client import Client, Patience
    from scanfleet_cli.tokens import CommandToken, Store, StoredTokens

P = ParamSpec("P")
R = TypeVar("R")

COMPLETE: Final = "_SCANFLEET_COMPLETE"
"""Environment variable by which a shell asks for completions."""

LIMIT: Final = 30  # rows of a list; a screen
_NOT_FOUND: Final = 404
_NOT_ALLOWED: Final = 405


@dataclass(frozen=True, slots=True)
class Effects:
    """Side effects of a run beyond reading and printing; tests replace them."""

    transport: Any = None
    """HTTP transport of all requests; the network by default."""

    async_transport: Any = None
    """HTTP transport of the asynchronous client; the network by default."""

    first_pause_seconds: float = 0.5
    """Pause before the first retry."""

    poll_seconds: float = 5.0
    """Polling interval."""

    completion_seconds: float = 0.9
    """Timeout of a read for completions; the shell blocks on it and on the start of the command."""

    browse: Callable[[str], bool] = webbrowser.open
    sleep: Callable[[float], None] = time.sleep
    store: Store | None = None
    """Token store; by default the keyring, else a file."""


class Session:
    """One run of the command.

    Args:
        config: contexts and environment.
        output: stdout and stderr.
        effects: other side effects.
    """

    def __init__(self, config: Config, output: Output, effects: Effects | None = None) -> None:
        self.config = config
        self.output = output
        self.effects = effects or Effects()
        self.url: str | None = None
        self.context: str | None = None
        self.token_file: Path | None = None
        self.timeout_seconds = 60.0
        self.limit: int | None = None
        self._client: Client | None = None
        self._of_command: CommandToken | None = None
        self.token_source = ""  # of the last token, as text
        self._refused = ""  # token that the service rejected last
        self._lock = threading.Lock()  # several threads read the token

    @functools.cached_property
    def endpoint(self) -> Endpoint:
        return self.config.endpoint(self.url, self.context)

    @functools.cached_property
    def stored_tokens(self) -> StoredTokens:
        """The stored tokens of sign-ins."""
        from scanfleet_cli.tokens import StoredTokens  # noqa: PLC0415 # only for those who sign in

        return StoredTokens(self.config.folder, self.effects.store, self.effects.transport)

    @property
    def has_display(self) -> bool:
        """Whether this machine can show a browser."""
        environment = self.config.environment
        return sys.platform in {"darwin", "win32"} or bool(
            environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")
        )

    def token(self) -> str:
        """Return the token to send now.

        Raises:
            CommandError: no source has a token, or its text is not one.
            UnavailableError: the token has expired, and the issuer is unavailable.
        """
        from scanfleet_cli.tokens import checked  # noqa: PLC0415 # not for commands that send no request

        token, self.token_source = self._token()
        return checked(token, self.token_source)

    def _token(self) -> tuple[str, str]:
        """Return the token to send now, and its source as text."""
        # Those of the environment belong to its gateway, or to the current context.
        environment, context = {} if self.context else self.config.environment, self.endpoint.context
        if self.token_file is not None:
            return _token_in(self.token_file), f"the file {self.token_file} (--token-file)"
        if token := environment.get("SCANFLEET_TOKEN", "").strip():
            return token, "SCANFLEET_TOKEN"
        if file := environment.get("SCANFLEET_TOKEN_FILE"):
            return _token_in(Path(file)), f"the file {file} (SCANFLEET_TOKEN_FILE)"
        if context is not None and context.token_command:
            source = f'the token_command of context "{context.name}"'
            return self._command_token(context.token_command, source).current(), source
        if context is not None and (kept := self._stored_token(context.name)) is not None:
            return kept
        url = self.endpoint.url
        raise CommandError(
            f"not signed in to {url}",
            Exit.NOT_ALLOWED,
            hint=f"scanfleet --context {self.context} login {url}, or add --token-file FILE"
            if self.context
            else f"scanfleet login {url}, or set SCANFLEET_TOKEN or SCANFLEET_TOKEN_FILE",
        )

    def token_refused(self, token: str) -> None:
        """Discard a token that the service rejected, if its source can return another."""
        self._refused = token
        if self._of_command is not None:
            self._of_command.refused(token)

    def _stored_token(self, name: str) -> tuple[str, str] | None:
        before = self.stored_tokens.store.where(name)
        token = self.stored_tokens.current(name, self.endpoint.url, self._refused)
        if token is None:
            return None
        # The keyring refused the new token, or takes it again.
        if (where := self.stored_tokens.store.where(name)) != before:
            self.output.note(f"the token of context {name} is now in {where}")
        return token, f"the sign-in of context {name}, stored in {where}"

    def _command_token(self, command: Sequence[str], source: str) -> CommandToken:
        from scanfleet_cli.tokens import CommandToken  # noqa: PLC0415 # only where a context has a command

        with self._lock:
            if self._of_command is None:
                self._of_command = CommandToken(command, source)
            return self._of_command

    @property
    def patience(self) -> Patience:
        """Retry policy while the service is unavailable or busy."""
        from scanfleet_cli.client import Patience  # noqa: PLC0415 # not for commands that send no request

        return Patience(
            timeout_seconds=self.timeout_seconds,
            first_pause_seconds=self.effects.first_pause_seconds,
            poll_seconds=self.effects.poll_seconds,
        )

    @property
    def client(self) -> Client:
        """The synchronous client, with the caller's token."""
        if self._client is None:
            from scanfleet_cli.client import Client  # noqa: PLC0415 # not for commands that send no request

            self._client = Client(
                self.endpoint.url,
                self.token,
                refused=self.token_refused,
                patience=self.patience,
                notice=self.repeated,
                transport=self.effects.transport,
            )
        return self._client

    def ask(self, call: Call[Any]) -> Any:
        """Return the response to a call as JSON."""
        return self.client.ask(call).json

    def notice(self, sentence: str) -> None:
        """Note a sentence that may contain text from the network."""
        self.output.note(printable(sentence))

    def repeated(self, sentence: str) -> None:
        """Note that a request is repeated; with a JSON format stderr contains only the error, as JSON."""
        if not self.output.format.machine:
            self.notice(sentence)

    def find(self, call: Call[R]) -> R | None:
        """Return the response to a call, None if the object does not exist."""
        try:
            return self.client.send(call)
        except ApiError as error:
            if error.status != _NOT_FOUND:
                raise
        return None

    def limit_or(self, default: int) -> int:
        """Return the value of `--limit`, else the default; 0 = all."""
        return default if self.limit is None else self.limit

    def rows(self, call: ListCall[Any], limit: int | None = None) -> Iterator[Row]:
        """Yield up to `limit` objects of a list (by default that of the command; 0 = all), and note the total if it is higher."""
        limit = self.limit_or(LIMIT) if limit is None else limit
        shown = 0
        from scanfleet_cli.client import page_of  # noqa: PLC0415 # not for commands that send no request

        for reply in self.client.replies(call, size=min(limit or 100, 100)):
            page = page_of(reply, call.items)
            for row in islice(page[call.items], (limit - shown) if limit else None):
                shown += 1
                yield row
            if limit and shown >= limit:
                if page["total"] > shown:
                    self.output.note(f"{shown:,} of {page['total']:,}; --limit 0 for all")
                return

    def limited(self, found: Iterable[Row], default: int | None = None) -> Iterator[Row]:
        """Yield up to `--limit` rows, and note the total if it is higher.

        Args:
            found: the rows.
            default: limit if there is no `--limit`; one screen on a terminal and all elsewhere if omitted.
        """
        limit = self.limit_or((LIMIT if self.output.terminal else 0) if default is None else default)
        number = 0
        for number, row in enumerate(found, 1):
            if limit and number > limit:
                continue
            yield row
        if limit and number > limit:
            self.output.note(f"{limit:,} of {number:,}; --limit 0 for all")

    def show_list(self, rows: Iterable[Row], columns: Sequence[Column], empty: str, name: str = "id") -> None:
        """Print rows, or note `empty` if there are none."""
        counted = _Counted(rows)
        self.output.many(counted, columns, name)
        if not counted.number:
            self.output.note(empty)

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask for confirmation of a destructive change.

        Raises:
            CommandError: the user declined, or there is no terminal to ask on.
        """
        if yes:
            return
        if not (os.isatty(0) and self.output.stderr.isatty()):
            raise CommandError(f"{question}: needs --yes without a terminal")
        if not click.confirm(question, err=True):
            raise CommandError("cancelled; nothing was changed", Exit.FAULT)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


class _Counted:
    """Rows, counted while they are read."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.number = 0
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.number += 1
            yield row


@contextmanager
def supported(what: str) -> Iterator[None]:
    """Name the reason if a service does not support an operation because it is older than this command.

    Args:
        what: the operation, in the plural.

    Raises:
        CommandError: the service has no such operation.
    """
    try:
        yield
    except ApiError as error:
        if error.status == _NOT_ALLOWED or (error.status == _NOT_FOUND and error.message == "Not Found"):
            raise CommandError(
                f"this service does not support {what}: it is older than this command",
                Exit.FAULT,
                hint="scanfleet doctor",
                status=error.status,
                request_id=error.request_id,
            ) from error
        raise


def _token_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read the token file: {error}", Exit.NOT_ALLOWED) from error


def read_text(file: TextIO) -> str:
    """Return the text of a file without a byte order mark.

    Raises:
        CommandError: it is not UTF-8.
    """
    try:
        return file.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CommandError(f"{file.name} is not UTF-8: {error}") from error


def with_session(command: Callable[Concatenate[Session, P], R]) -> Callable[P, R]:
    """Pass the session to a command as its first argument."""
    return click.pass_obj(command)


def _chosen_format(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.obj.output.format = Format(value)


def _chosen_limit(context: click.Context, _parameter: click.Parameter, value: int | None) -> None:
    context.obj.limit = value


Command = TypeVar("Command", bound=Callable[..., Any])


def formats(*kinds: Kind, xml: bool = False) -> Callable[[Command], Command]:
    """Add the options -o and --json to a command that prints objects, or results, which have nmap's XML too.

    Args:
        kinds: of the objects; with several, the command itself checks the fields against that which it prints.
        xml: whether the command prints nmap's XML too.
    """

    def choose(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
        output: Output = context.obj.output
        if value is not None:
            output.fields = [field.strip() for field in value.split(",") if field.strip()]
        if len(kinds) == 1:
            output.check_fields(kinds[0])

    def complete(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
        before, comma, last = begun.rpartition(",")
        names = dict.fromkeys(name for kind in kinds for name in fields_of(kind))
        return [before + comma + name for name in names if name.startswith(last)]

    def add(command: Command) -> Command:
        # Read first, so that a mistake in any later option is already reported in this format.
        command = click.option(
            "-o",
            "--output",
            type=click.Choice([each.value for each in Format if xml or each is not Format.XML]),
            is_eager=True,
            expose_value=False,
            callback=_chosen_format,
            help="Output format. Default: table.",
        )(command)
        return click.option(
            "--json",
            metavar="FIELDS",
            is_flag=False,
            flag_value="",
            expose_value=False,
            callback=choose,
            shell_complete=complete,
            help="Print only these fields as JSON, for example a,b.c. Without a value: list the fields and exit 2.",
        )(command)

    return add


def _limit(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--limit",
        type=click.IntRange(min=0),
        expose_value=False,
        callback=_chosen_limit,
        help=f"Maximum number of rows; 0 = all. Default: {default}.",
    )


_long_limit = _limit(f"{LIMIT} on a terminal, otherwise all")


def lists(kind: Kind) -> Callable[[Command], Command]:
    """Add the options of a command that prints a list."""
    return lambda command: formats(kind)(_limit(str(LIMIT))(command))


def long_lists(*kinds: Kind, xml: bool = False) -> Callable[[Command], Command]:
    """Add the options of a command that prints results or a ledger, which a pipe receives in full by default."""
    return lambda command: formats(*kinds, xml=xml)(_long_limit(command))


yes = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def many_failed(errors: Sequence[CommandError], output: Output) -> None:
    """Report the errors of a command that continued after each.

    Raises:
        CommandError: the last error, with the exit code of the first.
    """
    for error in errors[:-1]:
        output.error(error)
    if errors:
        raise CommandError(
            errors[-1].message,
            errors[0].code,
            hint=errors[-1].hint,
            status=errors[-1].status,
            request_id=errors[-1].request_id,
        )
