"""`exec -it` by somebody who types, and programs in the background, against a real daemon."""

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e80_cli.conftest import Cli
from tests.e80_cli.person import CTRL_C, CTRL_D, ENTER, ESCAPE

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = pytest.mark.docker
# So that what is typed, which the terminal shows, is not taken for what is printed.
PROMPT = ("env", "PS1=ready> ", "bash", "--norc", "--noprofile")


@pytest.fixture
def cli(cli_alone: Cli, daemon: "Daemon") -> Cli:
    cli_alone.env |= {"_8080_BASE_URL": daemon.base_url, "_8080_API_KEY": daemon.api_key}
    return cli_alone


@pytest.fixture
def box(cli: Cli) -> Iterator[str]:
    made = cli("sandbox", "create").stdout.decode().strip()
    yield made
    cli("sandbox", "stop", made)


def running(cli: Cli, sandbox_id: str) -> list[str]:
    return cli("sandbox", "ps", sandbox_id).stdout.decode().split()


def until_none_runs(cli: Cli, sandbox_id: str) -> None:
    deadline = time.monotonic() + 20
    while running(cli, sandbox_id):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)


def test_a_shell_as_at_home(cli: Cli, box: str) -> None:
    """Keys, size, Ctrl-C, the exit code, and the terminal afterwards."""
    with cli.session("sandbox", "exec", "-it", box, "--", *PROMPT, rows=33, cols=77) as person:
        person.see("ready> ")
        assert person.is_raw
        person.type("echo $((6*7)) $TERM; tty", ENTER)
        person.see("42 xterm", "/dev/pts/", "ready> ")
        person.type("stty size", ENTER)
        person.see("33 77", "ready> ")
        person.resize(50, 132)
        person.type("until [ \"$(stty size)\" = '50 132' ]; do sleep 0.02; done; echo grown$((1+1))", ENTER)
        person.see("grown2", "ready> ")
        person.type("sh -c 'echo sleeping$((1+1)); exec sleep 100'", ENTER)
        person.see("sleeping2")
        person.type(CTRL_C)
        person.see("^C", "ready> ")
        person.type("echo grüße | tr a-z A-Z; exit 7", ENTER)
        person.see("GR")
        assert person.ended() == 7
        assert person.is_as_before
    assert running(cli, box) == []


def test_a_program_that_has_the_whole_screen(cli: Cli, box: str) -> None:
    (cli.folder / "poem").write_text("".join(f"line {number}\n" for number in range(1, 200)))
    assert cli("sandbox", "cp", "poem", f"{box}:poem").returncode == 0
    with cli.session("sandbox", "exec", "-it", box, "--", "less", "poem", rows=10, cols=40) as person:
        person.see("\x1b[?1049h", "line 1", "line 9")
        person.type(" ")
        person.see("line 18")
        person.type("G")
        person.see("line 199", "(END)")  # now it waits for a key
        person.resize(20, 40)
        person.see("~", "(END)")  # it has room below the last line now
        person.type("q")
        assert person.ended() == 0
        assert person.is_as_before


def test_an_editor_writes_what_is_typed(cli: Cli, box: str) -> None:
    with cli.session("sandbox", "exec", "-it", box, "--", "vi", "note") as person:
        person.see("note")
        person.type("ihello", ENTER, "world", ESCAPE)
        person.see("world")
        person.type(":wq", ENTER)
        assert person.ended() == 0
        assert person.is_as_before
    assert cli("sandbox", "cp", f"{box}:note", "-").stdout == b"hello\nworld\n"


def test_the_end_of_input_is_typed(cli: Cli, box: str) -> None:
    with cli.session("sandbox", "exec", "-it", box, "--", "sh", "-c", "echo on; cat >f; echo over") as person:
        person.see("on")
        person.type("typed", ENTER)
        person.see("typed")
        person.type(CTRL_D)
        person.see("over")
        assert person.ended() == 0
    assert cli("sandbox", "cp", f"{box}:f", "-").stdout == b"typed\n"


@pytest.mark.parametrize(
    ("leave", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (None, 130)]
)
def test_whoever_leaves_has_the_terminal_back_and_hangs_up(
    cli: Cli, box: str, leave: signal.Signals | None, code: int
) -> None:
    with cli.session("sandbox", "exec", "-it", box, "--", *PROMPT) as person:
        person.see("ready> ")
        # Told by the program in the foreground: keys that come earlier are the shell's.
        person.type("sh -c \"printf '\\033[?1049h\\033[?25l'; exec sleep 1000\"", ENTER)
        person.see("\x1b[?25l")
        if leave is None:
            person.type(CTRL_C)
            person.see("ready> ")
            person.type(ENTER, "~.")
        else:
            person.process.send_signal(leave)
        assert person.ended() == code
        assert person.is_as_before
        assert b"\x1b[?1047l\x1b[?25h" in person.shown, "the screen and the cursor are back"
        assert b"Traceback" not in person.shown
    until_none_runs(cli, box)


def test_a_session_goes_on_over_a_restart_and_ends_when_nobody_answers(
    cli_alone: Cli, own_daemon: "Daemon"
) -> None:
    cli_alone.env |= {"_8080_BASE_URL": own_daemon.base_url, "_8080_API_KEY": own_daemon.api_key}
    box = cli_alone("sandbox", "create").stdout.decode().strip()
    words = ("--patience-s", "6", "sandbox", "exec", "-it", box, "--", *PROMPT)
    with cli_alone.session(*words) as person:
        person.see("ready> ")
        person.type("mine=kept; echo set$((1+1))", ENTER)
        person.see("set2", "ready> ")
        own_daemon.stop(signal.SIGKILL)
        person.type("echo $mine$((2+2))", ENTER)  # into a connection that nobody serves
        own_daemon.start()
        seen = person.see("kept4", "ready> ")
        own_daemon.stop()
        assert person.ended() == 125
        assert b"Enter ~ . leaves" in seen + person.shown, "what to do while nobody answers"
        assert person.is_as_before
        assert b"8080 sandbox kill" in person.shown, "how to end what could not be told to end"


def test_a_program_that_cannot_be_started_on_a_terminal(cli: Cli) -> None:
    with cli.session("sandbox", "exec", "-it", "sbx_none", "--", "bash") as person:
        assert person.ended() == 125
        assert b"sbx_none" in person.shown
        assert person.is_as_before


def test_whoever_leaves_before_it_runs_leaves_nothing_running(cli: Cli, box: str) -> None:
    for wait_s in (0.2, 0.25, 0.3, 0.35, 0.4, 0.5):
        with cli.session("sandbox", "exec", "-it", box, "--", "sleep", "1000") as person:
            time.sleep(wait_s)  # at any moment of its start
            person.process.send_signal(signal.SIGTERM)
            assert person.ended() in (143, -signal.SIGTERM)
            assert person.is_as_before
    until_none_runs(cli, box)


def test_a_terminal_is_asked_for_where_there_is_none(cli: Cli, box: str) -> None:
    done = cli("sandbox", "exec", "-it", box, "--", "bash")
    assert done.returncode == 64
    assert b"stdin is no terminal" in done.stderr


def test_archives_go_through_pipes_both_ways(cli: Cli, box: str) -> None:
    """`tar c . | 8080 sandbox exec -i ID -- tar x`: binary, and with an end."""
    content = os.urandom(3_000_000)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("some/file")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    program = cli.start("sandbox", "exec", "-i", box, "--", "tar", "x", stdin=subprocess.PIPE)
    out, errors = program.communicate(packed.getvalue(), timeout=60)
    assert (program.returncode, out, errors) == (0, b"", b"")
    done = cli("sandbox", "exec", box, "--", "tar", "c", "some")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        member = archive.extractfile("some/file")
        assert member is not None
        assert hashlib.sha256(member.read()).digest() == hashlib.sha256(content).digest()


def test_input_is_passed_on_as_it_comes(cli: Cli, box: str) -> None:
    program = cli.start("sandbox", "exec", "-i", box, "--", "sh", "-c", "cat; echo end >&2", stdin=-1)
    assert program.stdin is not None
    assert program.stdout is not None
    for line in (b"first\n", b"\xff\x00second\n"):
        program.stdin.write(line)
        program.stdin.flush()
        assert program.stdout.readline() == line
    out, errors = program.communicate(timeout=30)
    assert (program.returncode, out, errors) == (0, b"", b"end\n")


def test_a_program_that_reads_nothing_is_no_hindrance(cli: Cli, box: str) -> None:
    """More than the sandbox keeps of what nobody reads."""
    program = cli.start("sandbox", "exec", "-i", box, "--", "sh", "-c", "echo 1; exit 3", stdin=-1)
    out, errors = program.communicate(os.urandom(2_000_000), timeout=60)
    assert (program.returncode, out, errors) == (3, b"1\n", b"")


def test_ctrl_c_ends_a_program_without_a_terminal(cli: Cli, box: str) -> None:
    script = "trap '' INT TERM HUP; sleep 1000 & echo on; wait"
    program = cli.start("sandbox", "exec", box, "--", "bash", "-c", script)
    assert program.stdout is not None
    assert program.stdout.readline() == b"on\n"
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == 130
    assert b"Traceback" not in errors
    until_none_runs(cli, box)


def test_a_program_that_is_left_running(cli: Cli, box: str) -> None:
    script = (
        "import os, signal\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (os.write(1, b'caught\\n'), os._exit(5)))\n"
        "os.write(2, b'err\\n'); os.write(1, b'out\\n')\nwhile True: signal.pause()"
    )
    started = cli("sandbox", "exec", "-d", box, "--", "python3", "-c", script)
    exec_id = started.stdout.decode().strip()
    assert (started.returncode, started.stderr) == (0, b"")
    assert running(cli, box) == [exec_id]
    code, shown = cli.on_terminal("sandbox", "ps", box)
    assert code == 0
    assert exec_id in shown
    assert "running" in shown
    following = cli.start("sandbox", "logs", "-f", box, exec_id)
    assert following.stdout is not None
    assert following.stdout.readline() == b"out\n"
    done = cli("sandbox", "logs", box)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
    assert cli("sandbox", "kill", "-s", "USR1", box, exec_id).stdout.decode().strip() == exec_id
    out, errors = following.communicate(timeout=30)
    assert (following.returncode, out, errors) == (5, b"caught\n", b"err\n")
    assert running(cli, box) == []
    events = [json.loads(line) for line in cli("sandbox", "logs", box, exec_id, "--json").stdout.splitlines()]
    assert [event["type"] for event in events][0 :: len(events) - 1] == ["exec.started", "exec.completed"]
    first = next(event["sequence_number"] for event in events if event["type"] == "exec.stdout.delta")
    assert cli("sandbox", "logs", box, exec_id, "--after", str(first)).stdout == b"caught\n"
    told = json.loads(cli("sandbox", "kill", box, exec_id, "--json").stdout)
    assert told == {"exec_id": exec_id, "signal": "TERM", "delivered": False}
    assert cli("sandbox", "ps", "--all", box).stdout.decode().split() == [exec_id]


def test_whoever_follows_may_leave(cli: Cli, box: str) -> None:
    command = ("bash", "-c", "echo on; exec sleep 1000")
    exec_id = cli("sandbox", "exec", "-d", box, "--", *command).stdout.decode().strip()
    following = cli.start("sandbox", "logs", "-f", box, exec_id)
    assert following.stdout is not None
    assert following.stdout.read(3) == b"on\n"
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=20)
    assert following.returncode == 130
    assert running(cli, box) == [exec_id]
    assert cli("sandbox", "kill", "-s", "9", box, exec_id).returncode == 0
    until_none_runs(cli, box)
    assert cli("sandbox", "logs", "-f", box, exec_id).returncode == 137


def test_output_that_is_not_kept_is_said_to_be_missing(cli: Cli, box: str) -> None:
    script = "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo last"
    exec_id = cli("sandbox", "exec", "-d", box, "--", "bash", "-c", script).stdout.decode().strip()
    until_none_runs(cli, box)
    done = cli("sandbox", "logs", box, exec_id)
    assert done.returncode == 0
    assert done.stdout.endswith(b"x\nlast\n")
    assert len(done.stdout) < 20_000_000
    assert b"bytes of output are not kept any more" in done.stderr


def test_long_output_is_whole_in_a_pipe_or_an_error(cli: Cli, box: str) -> None:
    """The server's record of an exec ends at 4 MB, files in the sandbox go on to 64 MiB."""
    done = cli("sandbox", "exec", box, "--", "sh", "-c", "seq 1500000; seq 900000 >&2; exit 3")
    assert done.returncode == 3
    for shown, last in ((done.stdout, 1_500_000), (done.stderr, 900_000)):
        assert shown == "".join(f"{number}\n" for number in range(1, last + 1)).encode()
    done = cli("sandbox", "exec", box, "--", "head", "-c", "70000000", "/dev/zero")
    assert (done.returncode, len(done.stdout)) == (125, 64 * 2**20)
    assert b"the output was cut after 67.1 MB" in done.stderr


def test_users(cli: Cli, box: str) -> None:
    assert cli("sandbox", "exec", "--user", "nobody", box, "--", "touch", "/tmp/f").returncode == 0
    assert cli("sandbox", "exec", "--user", "nobody", box, "--", "touch", "/home/user/f").returncode == 1
    done = cli("sandbox", "exec", "--user", "root", box, "--", "id")
    assert done.returncode == 125
    assert b"root" in done.stderr


def test_bash_code(cli: Cli, box: str) -> None:
    done = cli("sandbox", "exec", "--language", "bash", box, "--code", "for i in 1 2; do echo $i; done")
    assert (done.returncode, done.stdout) == (0, b"1\n2\n")


def test_contexts_keep_their_state(cli: Cli, box: str, tmp_path: Path) -> None:
    ctx = cli("sandbox", "context", "create", box).stdout.decode().strip()

    def code(text: str, *words: str) -> tuple[int, bytes]:
        done = cli("sandbox", "exec", box, "--context", ctx, "--code", text, *words)
        return done.returncode, done.stdout

    assert code("x = 41") == (0, b"")
    assert code("x + 1") == (0, b"42\n")
    assert code("1/0")[0] == 1
    assert cli("sandbox", "context", "list", box).stdout.decode().split() == [ctx]
    drawing = "import matplotlib.pyplot as plt; plt.plot([1, x]); plt.show()"
    done = cli("sandbox", "exec", box, "--context", ctx, "--code", drawing)
    assert done.returncode == 0
    assert b"image/png" in done.stderr
    assert b"--save" in done.stderr
    done = cli("sandbox", "exec", box, "--context", ctx, "--code", drawing, "--save", str(tmp_path / "plots"))
    assert done.returncode == 0
    assert (tmp_path / "plots" / "result-1.png").read_bytes().startswith(b"\x89PNG")
    sleeping = cli.start(
        "sandbox", "exec", box, "--context", ctx, "-c", "print(1, flush=True)\nwhile 1: pass"
    )
    assert sleeping.stdout is not None
    assert sleeping.stdout.readline() == b"1\n"
    assert cli("sandbox", "context", "interrupt", box, ctx).returncode == 0
    _, errors = sleeping.communicate(timeout=30)
    assert sleeping.returncode == 130
    assert b"KeyboardInterrupt" in errors
    assert code("x") == (0, b"41\n")
    assert cli("sandbox", "context", "restart", box, ctx).returncode == 0
    assert code("x")[0] == 1
    assert cli("sandbox", "context", "delete", box, ctx).stdout.decode().strip() == ctx
    assert cli("sandbox", "context", "list", box).stdout == b""
