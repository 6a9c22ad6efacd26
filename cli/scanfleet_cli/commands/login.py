"""`scanfleet login` and `scanfleet logout`."""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import click
import httpx2

from scanfleet_cli import calls
from scanfleet_cli.client import Client
from scanfleet_cli.config import Context, check_url, same_url
from scanfleet_cli.errors import ApiError, CommandError, Exit
from scanfleet_cli.login import SignIn, discover
from scanfleet_cli.session import Session, with_session
from scanfleet_cli.tokens import Tokens, checked


@click.command()
@click.argument("url", required=False)
@click.option("--name", help="Name of the context; by default the host of the gateway.")
@click.option("--device", is_flag=True, help="Sign in with a code in a browser on any machine.")
@click.option("--token-stdin", is_flag=True, help="Read a token from stdin instead of signing in.")
@with_session
def login(session: Session, /, *, url: str | None, name: str | None, device: bool, token_stdin: bool) -> None:
    """Sign in to a gateway, and make it the current context."""
    address = check_url(url) if url else session.endpoint.url
    context = _context(session, address, name)
    if token_stdin:
        tokens, source = Tokens(address, _first_line()), "the first line of stdin"
    else:
        tokens, source = _signed_in(session, address, device=device), "the response of the issuer"
    checked(tokens.access_token, source)
    user = _user(session, tokens)
    before = session.config.contexts().get(context.name)
    session.stored_tokens.keep(context.name, tokens)
    session.config.add(context, use=True)
    if before is not None and before.token_command:
        session.output.note(f"the token_command of context {context.name} was removed")
    session.output.note(
        f'✓ Signed in to {urlsplit(address).netloc} as user {user} (context "{context.name}", token in {session.stored_tokens.store.where(context.name)})'
    )


def _first_line() -> str:
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError as error:
        raise CommandError("stdin is not UTF-8", Exit.NOT_ALLOWED) from error


def _context(session: Session, url: str, name: str | None) -> Context:
    """Return the context to sign in to: the named one, else one of this gateway, the current one first, else a new one.

    Raises:
        CommandError: the named context has another gateway.
    """
    contexts = session.config.contexts()
    named = name or session.context or session.config.environment.get("SCANFLEET_CONTEXT")
    if named and named in contexts and not same_url(contexts[named].url, url):
        raise CommandError(
            f"context {named} has the gateway {contexts[named].url}, not {url}",
            hint=f"scanfleet context add {named} --url {url}, or another --name",
        )
    if named:
        return Context(named, url)
    names = [each for each, known in contexts.items() if same_url(known.url, url)]
    current = session.config.current
    return Context(current if current in names else names[0] if names else urlsplit(url).netloc, url)


def _signed_in(session: Session, url: str, *, device: bool) -> Tokens:
    with Client(url, patience=session.patience, transport=session.effects.transport) as anonymous:
        try:
            info = anonymous.send(calls.read_info())
        except ApiError as error:
            if error.status != httpx2.codes.NOT_FOUND:
                raise
            raise CommandError(
                f"{url} does not state its issuer", Exit.FAULT, hint="scanfleet login --token-stdin"
            ) from error
    if "oidc" not in info.sign_in:
        raise CommandError(
            f"{url} does not support a sign-in at an issuer, only tokens",
            Exit.NOT_ALLOWED,
            hint="scanfleet login --token-stdin",
        )
    issuer = discover(info.issuer, session.effects.transport)
    signing_in = SignIn(url, info, issuer, session.output.prompt, session.effects.transport)
    if device or (not session.has_display and issuer.device_endpoint):
        return signing_in.by_device(session.effects.sleep)
    return signing_in.by_browser(session.effects.browse)


def _user(session: Session, tokens: Tokens) -> str:
    """Return the user of a token.

    Raises:
        ApiError: the service rejected it.
    """
    with Client(
        tokens.url, tokens.access_token, patience=session.patience, transport=session.effects.transport
    ) as client:
        try:
            return str(client.send(calls.read_me()).user_id)
        except ApiError as error:
            if error.status != httpx2.codes.NOT_FOUND:
                raise
        client.send(calls.list_subnets().page(1, 1))  # an older service; it still rejects an invalid token
        return "of the token"


@click.command()
@click.argument("name", required=False)
@with_session
def logout(session: Session, /, *, name: str | None) -> None:
    """Delete the stored tokens of a context, by default the current one; they remain valid until they expire."""
    context = session.config.endpoint(name=name or session.context).context
    if context is None:
        raise CommandError("no context is configured", hint="scanfleet logout NAME")
    session.stored_tokens.delete(context.name)
    if context.token_command:
        raise CommandError(
            f"context {context.name} has a token_command, which signs in each command",
            hint=f"scanfleet context remove {context.name}",
        )
    session.output.note(f"✓ signed out of {context.name}")
