"""Writes docs/cli.md: its examples are run against the double of the API, its reference follows from the commands."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click

from scanfleet import rest
from scanfleet.messages import JobStatus
from scanfleet_cli import main
from scanfleet_cli.config import Config
from scanfleet_cli.errors import MEANINGS
from scanfleet_cli.output import Output
from scanfleet_cli.session import Session, World
from scanfleet_cli.testing import NOW, TOKEN, FakeApi, FakeJob, result
from scanfleet_cli.tokens import FileStore

WIDTH: Final = 100  # columns of the terminal in the examples
URL: Final = "https://scanfleet.example.com"

_INTRO: Final = """\
# The command line

`scanfleet` scans networks through the API of a gateway. In a checkout `make cli` installs it into `.venv/bin`. For other machines
`make wheel` builds a wheel that needs Python 3.11 or newer and no part of the services: `pipx install scanfleet_cli-….whl`; with
the extra `keyring` tokens are kept in the system's keyring.

Data goes to stdout, everything else to stderr. On a terminal lists are tables; elsewhere they are lines with tabs and without a
header, times are RFC 3339, and nothing has a colour. What comes from the network is shown with escapes for whatever does not print.

## Address and token

The address comes from `--url`, else `SCANFLEET_URL`, else the context: `--context`, else `SCANFLEET_CONTEXT`, else the one in use.
The token comes from `--token-file`, else `SCANFLEET_TOKEN`, else the file that `SCANFLEET_TOKEN_FILE` names, else the context: its
`token_command`, or what `scanfleet login` brought. A token of a context goes to the context's own address and to no other.
`scanfleet whoami` shows what is used and where it came from, `scanfleet doctor` what is wrong.

```toml
# ~/.config/scanfleet/config.toml
current = "prod"

[context.prod]
url = "https://scanfleet.example.com"

[context.local]
url = "http://127.0.0.1:8080"
token_command = ["make", "-s", "-C", "/opt/scanfleet", "token", "USER=7"] # run when a token is needed; its output is not stored
```

`scanfleet login URL` signs in at the issuer that the gateway names: in a browser on this machine, or, without a display or with
`--device`, by a code that is typed in a browser on any machine. The tokens are kept in the system's keyring, else in a file that
only you can read, and refreshed before they end.

## Examples
"""

_SDK: Final = """\
## From Python

The command is made of a typed SDK, which has the same calls for threads and for asyncio:

```python
from scanfleet_cli import calls
from scanfleet_cli.client import Client

with Client("https://scanfleet.example.com", token) as client:
    job = client.send(calls.create_tasks([5], policy_id=3)).jobs[0]
    for task in client.watch(job.id):
        print(task.status.status, task.status.progress)
    for result in client.results(job.id):
        print(result.ip_address, result.port)
```

A call that is safe to repeat is repeated while the service is unavailable or busy; a POST of jobs has a key, so that it makes the
jobs once. `watch` joins a cut stream again, and polls where streams do not last. A stream of results that is cut raises
`UnavailableError`; it never ends as a short list.
"""

_EXAMPLES: Final = (
    ("Scan a network, and print what is open:", "scanfleet scan 127.9.8.0/24 --ports 22,80 --preset quick"),
    ("The same network again uses what is there. Exit 8 when a port is open:", "scanfleet -q scan 127.9.8.0/24 --ports 22,80 --preset quick --fail-on open --json ip_address,port"),
    ("Register a network and a policy under names, and submit:", "scanfleet subnet create lab 127.9.9.0/24 --exclude 127.9.9.128/25"),
    ("", "scanfleet policy create web --preset quick --ports 22,80,443 -o name"),
    ("", "scanfleet job submit --subnet lab --policy web"),
    ("", "scanfleet job list"),
    ("A job that did not probe everything says what, and why:", "scanfleet job wait 43"),
    ("", "scanfleet job ledger 43"),
    ("", "scanfleet job ledger 43 --not-probed --networks"),
    ("", "scanfleet job map 43"),
    ("Fields for scripts:", "scanfleet job show 43 --json job_id,status.status,status.progress"),
    ("An error says what failed and what to do:", "scanfleet job cancel 41"),
)  # fmt: skip


def page() -> str:
    """The page, without its first line."""
    return "\n".join([_INTRO, *_examples(), *_exit_codes(), _SDK, "## Commands\n", *_reference()]) + "\n"


def _examples() -> Iterator[str]:
    api = FakeApi()
    api.tokens = [TOKEN]
    api.made = _becomes
    with TemporaryDirectory() as folder:
        for text, command in _EXAMPLES:
            if text:
                yield f"{text}\n"
            yield f"```console\n$ {command}\n{run(api, Path(folder), command)}```\n"


def run(api: FakeApi, folder: Path, command: str) -> str:
    """What a command prints, and its exit code unless that is 0."""
    printed = io.StringIO()
    output = Output(printed, printed)
    output.width, output.now = WIDTH, lambda: NOW + timedelta(minutes=3)
    config = Config(folder, {"SCANFLEET_URL": URL, "SCANFLEET_TOKEN": TOKEN, "NO_COLOR": "1"})
    world = World(transport=api, async_transport=api, store=FileStore(folder / "tokens.json"))
    code = main.run(shlex.split(command)[1:], Session(config, output, world))
    return printed.getvalue() + (f"[exit code {int(code)}]\n" if code else "")


def _becomes(job: FakeJob) -> None:
    """What each job of the examples finds: those of 127.9.9.0/24 fail."""
    if job.id <= 42:  # noqa: PLR2004 # the two scans
        job.results, job.machines = (
            [result(1, "127.9.8.1", 22), result(2, "127.9.8.7", 80, service="http", version="nginx")],
            2,
        )
        return
    job.states = [(JobStatus.RUNNING, 10), (JobStatus.FAILED, 75)]
    job.counts = {"answered": 19, "silent": 140, "down": 33, "lost": 64}
    reason = "nmap was killed three times"
    job.not_probed = [
        rest.LedgerEntry(address=f"127.9.9.{64 + n}", ports="22,80,443", outcome="lost", reason=reason)
        for n in range(64)
    ]
    job.letters = "a" * 19 + "s" * 45 + "l" * 64 + "s" * 95 + "d" * 33


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes\n\n| code | meaning |\n|---|---|"
    yield from (f"| {int(code)} | {meaning} |" for code, meaning in MEANINGS.items())
    yield ""


def _reference() -> Iterator[str]:
    context = click.Context(main.cli, info_name="scanfleet")
    yield from _command(context, main.cli)


def _command(context: click.Context, command: click.Command) -> Iterator[str]:
    if not isinstance(command, click.Group) or context.parent is None:
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"### {context.command_path}\n"
        yield f"`{context.command_path} {usage}`".replace(" `", "`") + "\n"
        if context.parent is not None:
            yield " ".join((command.help or "").replace("\b", "").split("\n\n")[0].split()) + "\n"
        yield from _options(context, command)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from _command(click.Context(found, parent=context, info_name=name), found)


def _options(context: click.Context, command: click.Command) -> Iterator[str]:
    records = [
        record
        for option in command.get_params(context)
        if isinstance(option, click.Option)
        and "--help" not in option.opts
        and (record := option.get_help_record(context))
    ]
    if records:
        yield "| option | meaning |\n|---|---|"
        yield from (f"| `{names}` | {' '.join(text.split())} |" for names, text in map(_cells, records))
        yield ""


def _cells(record: tuple[str, str]) -> tuple[str, str]:
    return record[0].replace("|", "\\|"), record[1].replace("|", "\\|")
