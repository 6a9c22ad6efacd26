"""`scanfleet completion` and `scanfleet version`."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

from scanfleet import VERSION
from scanfleet_cli.errors import CommandError
from scanfleet_cli.session import COMPLETE, Session, with_session

_COMPLETION_HELP: Final = """Print the completion script of a shell.

\b
bash: scanfleet completion bash > ~/.local/share/bash-completion/completions/scanfleet
zsh:  scanfleet completion zsh > a folder of $fpath, named _scanfleet
fish: scanfleet completion fish > ~/.config/fish/completions/scanfleet.fish
"""


@click.command(help=_COMPLETION_HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    kind = get_completion_class(shell)
    if kind is None:
        raise CommandError(f"no completion for {shell}")
    session: Session = context.obj
    session.output.emit(kind(context.find_root().command, {}, "scanfleet", COMPLETE).source())


@click.command()
@with_session
def version(session: Session) -> None:
    """Print the version."""
    session.output.emit(f"scanfleet {VERSION}")
