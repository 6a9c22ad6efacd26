"""The entry point: the tree of commands, loaded as far as one run needs it, and the exit code of each end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import shell_complete

from scanfleet_cli.completion import complete_context
from scanfleet_cli.config import Config
from scanfleet_cli.errors import MEANINGS, CommandError, Exit, ScanfleetError, explain
from scanfleet_cli.output import Format, Output
from scanfleet_cli.session import COMPLETE, Session

COMMANDS: Final = {
    "scan": "Scan networks: register, submit, watch, and print the results.",
    "job": "Scan jobs: submit, watch, cancel and read them.",
    "subnet": "Networks to scan, and their exclusions.",
    "policy": "Scan policies: ports, technique, detection, speed.",
    "deletion": "Receipts of deleted jobs.",
    "audit": "The audit log, for administrators.",
    "context": "Gateways and their credentials.",
    "login": "Sign in to a gateway, and make it the current context.",
    "logout": "Delete the stored tokens of a context.",
    "whoami": "Show the gateway, the user, and the source of the token.",
    "limits": "Show the rate limits and their current use.",
    "api": "Send a raw request to the API, with the token.",
    "doctor": "Check address, TLS, clock, token and versions.",
    "completion": "Print the completion script of a shell.",
    "version": "Print the version.",
}
"""Name and help of each command; its module is imported only when it runs, so that --help is fast."""

_MODULES: Final = {"logout": "login", "whoami": "me", "limits": "me", "completion": "about", "version": "about"}
"""Modules of the commands that share one; every other command has a module of its name."""

_EXIT_CODES: Final = "\n".join(["Exit codes:", "", "\b", *(f"  {code:>3}  {text}" for code, text in MEANINGS.items())])


class _Lazy(click.Group):
    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"scanfleet_cli.commands.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


# Not a docstring: click's mark of text that keeps its lines is a control character.
_HELP: Final = """Scan networks with Scanfleet, and see which addresses were probed.

\b
scanfleet context add lab --url http://127.0.0.1:8080
scanfleet scan 127.9.8.0/24 --preset quick
scanfleet job ledger 41 --not-probed
"""


@click.command(
    cls=_Lazy,
    help=_HELP,
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("--context", metavar="NAME", help="Context to use for this command.", shell_complete=complete_context)
@click.option("--url", help="URL of the gateway, instead of that of a context.")
@click.option("--token-file", type=click.Path(path_type=Path), help="File with the token.")
@click.option(
    "--retry",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time limit of retries while the service is unavailable or busy.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="Colour of states.")
@click.pass_obj
def cli(
    session: Session,
    /,
    *,
    context: str | None,
    url: str | None,
    token_file: Path | None,
    retry: float,
    quiet: bool,
    color: str,
) -> None:
    """Apply the options that all commands share."""
    session.context, session.url, session.token_file, session.timeout_seconds = context, url, token_file, retry
    session.output.quiet = quiet
    session.output.coloured = _coloured(color, session)


def _coloured(color: str, session: Session) -> bool:
    environment = session.config.environment
    if color != "auto":
        return color == "always"
    if environment.get("NO_COLOR"):
        return False
    forced = environment.get("CLICOLOR_FORCE", "0") not in {"", "0"}
    return forced or (session.output.terminal and environment.get("TERM") != "dumb")


def run(arguments: Sequence[str], session: Session) -> int:
    """Run the command.

    Returns:
        The exit code.
    """
    output = session.output
    try:
        return _run(arguments, session)
    except ScanfleetError as error:
        end = explain(error)
        output.error(end)
        return end.code
    except KeyboardInterrupt:
        output.note("interrupted")
        return Exit.INTERRUPTED
    finally:
        session.close()


def _run(arguments: Sequence[str], session: Session) -> int:
    # Not `cli.main`, which prints errors itself and exits 1 on a broken pipe.
    try:
        with cli.make_context("scanfleet", list(arguments), obj=session) as context:
            code: Any = cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        session.output.prompt(error.format_message())
        return Exit.REFUSED
    except click.UsageError as error:
        session.output.format = _format(arguments)
        usage = error.ctx.command_path if error.ctx else "scanfleet"
        raise CommandError(error.format_message(), hint=f"{usage} --help") from error
    except click.ClickException as error:
        raise CommandError(error.format_message()) from error
    except (click.Abort, EOFError) as error:
        raise KeyboardInterrupt from error
    return code if isinstance(code, int) else Exit.DONE


def _format(arguments: Sequence[str]) -> Format:
    """Return the format of -o, which a command has not read if it does not know another option."""
    command = click.Command(
        "scanfleet",
        params=[click.Option(["-o", "--output"])],
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    text = command.make_context("scanfleet", list(arguments), resilient_parsing=True).params.get("output")
    return Format(text) if text in list(Format) else Format.TABLE


def main() -> None:
    try:
        code = _main()
    except KeyboardInterrupt:  # before or after the run
        code = Exit.INTERRUPTED
    sys.exit(code)


def _main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that its encoding lacks is escaped, as on stderr; the line ends of CSV remain as written.
        sys.stdout.reconfigure(errors="backslashreplace", newline="")
    session = Session(Config.of_user(), output := Output())
    if instruction := os.environ.get(COMPLETE):
        # An error, or a prompt of a token command, would appear within the line that the user is typing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        return shell_complete(cli, {"obj": session}, "scanfleet", COMPLETE, instruction)
    if output.stdout.isatty():
        output.width = os.get_terminal_size(output.stdout.fileno()).columns or 80
    try:
        code = run(sys.argv[1:], session)
        output.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe: `| head -1`
        # Python flushes stdout again at exit, which would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.stdout.fileno())
        code = Exit.DONE
    return code
