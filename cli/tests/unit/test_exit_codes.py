"""Every exit code of the table."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scanfleet.contracts.messages import JobStatus
from scanfleet_cli import main
from scanfleet_cli.errors import MEANINGS, Exit
from scanfleet_cli_testing.api import FakeApi


def test_missing_token_exits_4(run: Any) -> None:
    """Without a token the error has a hint to sign in."""
    ended = run("job", "list", environment={"SCANFLEET_URL": "http://scanfleet.test"})
    assert ended.code == 4
    assert "scanfleet login http://scanfleet.test" in ended.err


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 2), (409, 2), (412, 2), (413, 2), (401, 4), (403, 4), (404, 5), (429, 6), (502, 6), (503, 6), (500, 1)],
)
def test_error_of_the_service_has_its_exit_code(api: FakeApi, run: Any, status: int, code: int) -> None:
    """The service's sentence and the request id are printed, whatever the format."""
    api.fault_of = lambda _request: httpx2.Response(
        status, json={"error": "as it is"}, headers={"X-Request-ID": "c0ffee"}
    )
    ended = run("--retry", "0", "job", "show", "41")
    assert ended.code == code
    assert ended.err.startswith("scanfleet: as it is\n")
    assert "c0ffee" in ended.err
    document = json.loads(run("--retry", "0", "job", "show", "41", "-o", "json").err)
    assert document["error"] == "as it is"
    assert document["status"] == status
    assert document["request_id"] == "c0ffee"


def test_service_that_cannot_be_reached_exits_6(api: FakeApi, run: Any) -> None:
    """The error of an unreachable service names its URL."""
    api.fault_of = lambda _request: httpx2.ConnectError("connection refused")
    ended = run("--retry", "0.01", "job", "show", "41")
    assert ended.code == 6
    assert "no response from http://scanfleet.test: connection refused" in ended.err


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (httpx2.ConnectError("connection refused"), "no response from http://scanfleet.test: connection refused"),
        (httpx2.Response(503, json={"error": "busy"}), "busy"),
    ],
)
def test_request_that_is_repeated_is_noted_once(api: FakeApi, run: Any, fault: Any, reason: str) -> None:
    """The command is not silent until its retries end; with a JSON format stderr is the error alone."""
    api.faults = [fault, fault, fault]
    ended = run("subnet", "list")
    assert ended.code == 0
    assert ended.err.startswith(f"{reason}; repeating the request for up to 60 s\n")
    assert ended.err.count("repeating") == 1
    api.faults = [fault, fault]
    assert "repeating" not in run("subnet", "list", "-o", "json").err
    api.faults = [fault, fault]
    assert "repeating" not in run("--quiet", "subnet", "list").err


@pytest.mark.parametrize("format_", [["-o", "json"], ["-ojsonl"], ["--output", "json"], ["--output=json"]])
@pytest.mark.parametrize("mistake", ["--nonsense", "--status"])
def test_usage_error_is_reported_in_the_format_of_the_command(run: Any, format_: list[str], mistake: str) -> None:
    """An unknown option and a missing value are found before the format is read."""
    ended = run("job", "list", *format_, mistake)
    assert ended.code == 2
    assert json.loads(ended.err)["hint"].endswith(" --help")


@pytest.mark.parametrize("fault", [httpx2.ReadError("connection reset"), httpx2.Response(503, json={"error": "busy"})])
def test_unknown_outcome_of_a_post_that_is_not_safe_to_repeat_exits_1(api: FakeApi, run: Any, fault: Any) -> None:
    """Exit code 6 promises that the command may be repeated, so it is not used where a repetition may do harm."""
    api.fault_of = lambda request: fault if request.method == "POST" else None
    ended = run("--retry", "0.01", "api", "POST", "revocation", "-f", "user_id=8")
    assert ended.code == 1
    assert "may have been carried out: check before you repeat it" in ended.err


def test_submit_with_an_unknown_outcome_prints_its_idempotency_key(api: FakeApi, run: Any) -> None:
    """Repeated with the key that the error names, the command creates no second job."""
    submit = ("--retry", "0.01", "scan", "127.9.8.0/24", "--no-watch")

    def fault(request: httpx2.Request) -> Exception | None:
        if request.method == "POST" and request.url.path == "/api/v1/task":
            api.carry_out(request)
            return httpx2.ReadError("connection reset")
        return None

    api.fault_of = fault
    ended = run(*submit)
    assert ended.code == 1
    key = ended.err.split("--key ")[1].split()[0]
    assert run(*submit, "--key", key).code == 6
    api.fault_of = lambda _request: None
    assert run(*submit, "--key", key).code == 0
    assert list(api.jobs) == [41]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--token-file", "{file}", "subnet", "list"], 4, "cannot read the token file: 'utf-8' codec"),
        (["login", "http://scanfleet.test", "--token-stdin"], 4, "stdin is not UTF-8"),
        (["scan", "--targets", "{file}"], 2, "{file} is not UTF-8"),
        (["scan", "-"], 2, "<stdin> is not UTF-8"),
        (["api", "POST", "subnet", "--input", "{file}"], 2, "{file} is not UTF-8"),
        (["api", "GET", "a\x01b"], 2, "the request is not valid: Invalid non-printable ASCII character in URL"),
        (["api", "GET", "subnet", "-H", "A: é"], 2, "the request is not valid: 'ascii' codec"),
        (["subnet", "create", "\udcff", "127.9.8.0/24"], 2, "the request is not valid: 'utf-8' codec"),
    ],
)
def test_input_that_cannot_be_encoded_or_decoded_is_named(
    api: FakeApi,
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    arguments: list[str],
    code: int,
    problem: str,
) -> None:
    """Wrong input is an error message and never a traceback, and nothing is sent."""
    file = tmp_path / "file"
    file.write_bytes(b"\xff\n")
    monkeypatch.setattr(sys, "stdin", stdin := file.open(encoding="utf-8"))
    with stdin:
        ended = run(*(each.replace("{file}", str(file)) for each in arguments))
    assert ended.code == code
    assert problem.replace("{file}", str(file)).replace("<stdin>", str(file)) in ended.err
    assert not api.requests


def test_interrupt_at_the_end_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the remaining output is written does not cause a traceback."""

    class Interrupted(io.StringIO):
        def flush(self) -> None:
            if self.getvalue().endswith("\n") and next(flushes):
                raise KeyboardInterrupt

    flushes = iter([False, True])  # of the line, of the rest
    monkeypatch.setattr(sys, "stdout", Interrupted())
    monkeypatch.setattr(sys, "argv", ["scanfleet", "version"])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        main.main()
    assert getattr(ended.value, "code", "a traceback") == 130


def test_answer_that_is_not_json_exits_1(api: FakeApi, run: Any) -> None:
    """A server that is not a gateway is reported in one sentence, also by doctor."""
    api.fault_of = lambda _request: httpx2.Response(200, text="<html>Welcome</html>")
    for command in (["job", "list"], ["job", "show", "41"], ["job", "results", "41"], ["subnet", "list"], ["whoami"]):
        ended = run(*command)
        assert ended.code == 1, command
        assert "is not JSON" in ended.err
    ended = run("doctor", "-o", "json")
    assert ended.code == 1
    assert [row["check"] for row in json.loads(ended.out) if not row["ok"]] == ["tls", "service", "token"]


@pytest.mark.parametrize(("end", "code"), [(JobStatus.COMPLETED, 0), (JobStatus.FAILED, 3), (JobStatus.CANCELLED, 7)])
def test_end_of_a_job_has_its_exit_code(api: FakeApi, run: Any, end: JobStatus, code: int) -> None:
    """Watching and waiting exit by how the job ends, unless asked not to."""
    api.states = [(JobStatus.RUNNING, 50), (end, 90)]
    assert run("scan", "127.9.8.0/24").code == code
    assert run("job", "watch", "41").code == code
    assert run("job", "wait", "41").code == code
    assert run("job", "watch", "41", "--no-exit-status").code == 0


def test_ctrl_c_leaves_the_job_running(api: FakeApi, run: Any) -> None:
    """Ctrl-C exits 130, leaves the job running and prints the command to return; --cancel-on-interrupt cancels it."""
    api.states = [(JobStatus.RUNNING, 62)]
    run("scan", "127.9.8.0/24", "--no-watch")
    api.fault_of = lambda request: KeyboardInterrupt() if request.url.path.endswith("/events") else None
    ended = run("job", "watch", "41")
    assert ended.code == 130
    assert "job 41 continues: scanfleet job watch 41, or scanfleet job cancel 41" in ended.err
    assert api.jobs[41].status == "running"
    assert run("job", "watch", "41", "--cancel-on-interrupt").code == 130
    assert api.jobs[41].status == "cancelled"


@pytest.mark.parametrize("command", [[], ["job"], ["context"]])
def test_group_without_a_command_prints_its_help_and_exits_2(run: Any, command: list[str]) -> None:
    """A group without a command prints its help, not an error message."""
    ended = run(*command)
    assert ended.code == 2
    assert ended.err.startswith("Usage: scanfleet")
    assert "scanfleet: " not in ended.err


@pytest.mark.parametrize("command", [[], ["completion"]])
def test_examples_in_the_help_keep_their_lines(
    run: Any, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """The mark of a paragraph that keeps its lines is not shown."""
    assert run(*command, "--help").code == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "\\b" in line]
    assert sum(line.startswith(("  scanfleet ", "  bash: ", "  zsh:  ", "  fish: ")) for line in lines) == 3


@pytest.mark.parametrize("group", ["job", "subnet", "policy", "context", "audit", "deletion"])
def test_help_of_a_group_has_whole_sentences(run: Any, capsys: pytest.CaptureFixture[str], group: str) -> None:
    """In a terminal of 80 columns the summary of each command is whole."""
    assert run(group, "--help").code == 0
    summaries = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    assert len(summaries) > 1
    assert not [line for line in summaries if line.endswith("...")]


def test_help_has_the_exit_codes(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows every exit code with its meaning."""
    assert run("--help").code == 0
    shown = capsys.readouterr().out
    assert set(MEANINGS) == set(Exit)
    for code, meaning in MEANINGS.items():
        assert f"{code:>3}  {meaning}" in shown


def test_text_that_stdout_cannot_encode_is_escaped(tmp_path: Path) -> None:
    """An export does not end at the first name or banner in another script, and its line ends are as written."""
    folder = tmp_path / "scanfleet"
    folder.mkdir()
    (folder / "config.toml").write_text('[context."日本"]\nurl = "http://scanfleet.test"\n', encoding="utf-8")
    done = subprocess.run(
        [Path(sys.executable).with_name("scanfleet"), "context", "list", "-o", "csv"],
        env={"XDG_CONFIG_HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    lines = [b"name,url,current,token_command", rb"\u65e5\u672c,http://scanfleet.test,false,", b""]
    assert (done.returncode, done.stdout) == (0, b"\r\n".join(lines))


def test_help_loads_no_module_that_only_commands_need() -> None:
    """The help of the whole command loads neither the client nor the models, most of what a command imports."""
    program = """
import sys
from scanfleet_cli.main import main
sys.argv = ["scanfleet", "--help"]
try:
    main()
finally:
    print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert {"authlib", "httpx2", "keyring", "pydantic", "scanfleet", "tomlkit"}.isdisjoint(done.stderr.split())
