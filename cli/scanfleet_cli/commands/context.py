"""`scanfleet context`: gateways and their credentials."""

from __future__ import annotations

import shlex
from typing import Any, Final

import click

from scanfleet_cli.completion import complete_context
from scanfleet_cli.config import Context, check_url
from scanfleet_cli.errors import CommandError
from scanfleet_cli.output import column
from scanfleet_cli.session import LIMIT, Session, formats, lists, with_session, yes

LOCAL: Final = "http://127.0.0.1:8080"
"""URL of the gateway of `make up`, the default of a new context."""

_FIELDS: Final = ("name", "url", "current", "token_command")


@click.group()
def context() -> None:
    """Gateways and their credentials."""


def _row(context: Context, current: str) -> dict[str, Any]:
    return {
        "name": context.name,
        "url": context.url,
        "current": context.name == current,
        "token_command": list(context.token_command),
    }


@context.command("list")
@lists(_FIELDS)
@with_session
def list_(session: Session) -> None:
    """List contexts."""
    current = session.config.current
    rows = [_row(each, current) for each in session.config.contexts().values()]
    columns = [column("NAME"), column("URL"), column("CURRENT"), column("TOKEN COMMAND", "token_command", wide=True)]
    session.show_list(
        session.limited(rows, LIMIT), columns, "no contexts yet: scanfleet context add NAME --url URL", "name"
    )


@context.command()
@click.argument("name", shell_complete=complete_context)
@with_session
def use(session: Session, /, *, name: str) -> None:
    """Make a context the current one."""
    session.config.use(name)
    session.output.note(f"✓ {name} is the current context")


@context.command()
@click.argument("name")
@click.option("--url", help="URL of the gateway.")
@click.option(
    "--token-command",
    metavar="COMMAND",
    help="Command that prints a token; its output is not stored.",
)
@click.option("--no-use", is_flag=True, help="Do not make it the current context.")
@with_session
def add(session: Session, /, *, name: str, url: str | None, token_command: str | None, no_use: bool) -> None:
    """Add or change a context, and make it the current one.

    Options that are not given keep their values.
    """
    known = session.config.contexts().get(name)
    address = url or session.url or (known and known.url) or session.config.environment.get("SCANFLEET_URL") or LOCAL
    command = known.token_command if known else ()
    if token_command is not None:
        try:
            command = tuple(shlex.split(token_command))
        except ValueError as error:
            raise CommandError(f"--token-command: {error}") from error
    session.config.add(Context(name, check_url(address), command), use=not no_use)
    session.output.note(f"✓ context {name}: {address} (in {session.config.file})")


@context.command()
@click.argument("name", shell_complete=complete_context)
@yes
@with_session
def remove(session: Session, /, *, name: str, yes: bool) -> None:
    """Remove a context and its stored tokens."""
    session.config.known(name)
    session.confirm(f"remove context {name}?", yes=yes)
    # First: after a failure the context still exists, and the command can be repeated.
    session.stored_tokens.delete(name)
    session.config.remove(name)
    session.output.note(f"✓ context {name} removed")


@context.command()
@click.argument("name", required=False, shell_complete=complete_context)
@formats(_FIELDS)
@with_session
def show(session: Session, /, *, name: str | None) -> None:
    """Show a context, by default the current one."""
    found = session.config.endpoint(name=name or session.context).context
    current = session.config.current
    row = _row(found or Context("", session.endpoint.url), current)
    lines = [f"{row['name'] or 'no context'}  {row['url']}"]
    if row["token_command"]:
        lines.append(f"  token_command  {shlex.join(row['token_command'])}")
    session.output.one(row, lambda: lines, "name")
