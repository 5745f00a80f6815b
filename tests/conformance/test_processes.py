"""What an agent does for processes: input, terminals, signals, users, logs of the newest output."""

import asyncio
import contextlib
import dataclasses
import itertools
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandboxd.agentlink.client import Agent, ExecRequest
from sandboxd.agentlink.errors import AgentRefusedError
from sandboxd.agentlink.exec_log import Gap, Outcome, Output
from sandboxd.runtimes.registry import create_runtime
from tests.conformance.sandbox import SANDBOX, agent_of, make_spec, output, request, settled

pytestmark = pytest.mark.docker

# Its terminals (as of release 20221219) know no /dev/tty and no Ctrl-C, Ctrl-D, Ctrl-Z.
GVISOR = "runsc"

_looks = itertools.count()


@pytest.fixture
async def agent(runtime) -> Agent:
    await runtime.create(await make_spec(runtime))
    agent = agent_of(runtime)
    await agent.hello()
    return agent


@pytest.fixture
async def talk(runtime) -> AsyncIterator[Any]:
    """Starts execs that are talked with."""
    begun: list[Session] = []

    def start(agent: Agent, run: ExecRequest) -> Session:
        begun.append(Session(agent, run))
        return begun[-1]

    yield start
    for session in begun:
        await session.leave()


def bash(script: str, name: str = "exec_1", **more: Any) -> ExecRequest:
    plain = dataclasses.replace(request("", name), code=None, argv=("bash", "-c", script))
    return dataclasses.replace(plain, **more)


async def said(agent: Agent, run: ExecRequest) -> str:
    data, _ = await output(agent.run(run))
    return data.decode()


class Session:
    """An exec that is talked with while it runs."""

    def __init__(self, agent: Agent, run: ExecRequest) -> None:
        self.agent = agent
        self.id = run.id
        self.seen = ""
        self.outcome: Outcome | None = None
        self._news = asyncio.Event()
        self._task = asyncio.ensure_future(self._read(agent.run(run)))

    async def _read(self, events: AsyncIterator[Any]) -> None:
        async for event in events:
            if isinstance(event, Output):
                self.seen += event.data.decode()
            elif isinstance(event, Outcome):
                self.outcome = event
            self._news.set()

    async def sees(self, pattern: str) -> str:
        """Waits until it has said that, and forgets what came before."""
        while (found := re.search(pattern, self.seen)) is None:
            assert self.outcome is None, self.seen
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), 20)
            except TimeoutError:
                raise AssertionError(f"{pattern!r} is not in {self.seen!r}") from None
        self.seen = self.seen[found.end() :]
        return found[0]

    async def type(self, text: str) -> None:
        _, is_open = await self.agent.stdin(self.id, text.encode(), None, False)
        assert is_open

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def ends(self) -> Outcome:
        await asyncio.wait_for(self._task, 20)
        assert self.outcome is not None
        return self.outcome


async def test_a_heredoc_does_not_hang_an_exec(agent):
    """Elsewhere `cat <<EOF` never returned (daytona#4230)."""
    script = (
        "cat <<EOF\none\nEOF\npython3 - <<EOF\nprint('two')\nEOF\ncat > /tmp/f <<'X'\n$three\nX\ncat /tmp/f"
    )
    assert await said(agent, bash(script)) == "one\ntwo\n$three\n"


async def test_a_program_that_reads_stdin_does_not_wait_for_it(agent):
    """Elsewhere an exec hung on an open stdin that nobody would write to (daytona#3770)."""
    assert (
        await said(agent, bash("cat; read line || echo end; grep x || echo none; wc -c")) == "end\nnone\n0\n"
    )
    code = request("import sys; print(repr(sys.stdin.read()))", "exec_2")
    assert await said(agent, code) == "''\n"


async def test_a_shell_that_dies_is_told_at_once_and_the_next_one_works(agent):
    """Elsewhere a dead shell left every later exec hanging (E2B#339)."""
    _, outcome = await output(agent.run(bash("kill -9 $$")))
    assert (outcome.exit_code, outcome.signal) == (None, 9)
    _, outcome = await output(agent.run(bash("exec >&- 2>&-; exit 3", "exec_2")))
    assert outcome.exit_code == 3
    assert await said(agent, bash("echo alive", "exec_3")) == "alive\n"


async def test_a_process_left_in_the_background_does_not_hold_up_the_answer(agent):
    """Elsewhere an exec waited for whatever held its output open (daytona#4520)."""
    async with asyncio.timeout(20):
        assert await said(agent, bash("sleep 600 & echo done")) == "done\n"


async def test_standard_streams_can_be_opened_by_name(agent):
    script = "echo a >/dev/stdout; echo b >/dev/stderr; cat /dev/stdin; echo d | tee /dev/stderr >/dev/null"
    for name, user in (("exec_1", "user"), ("exec_2", "nobody")):
        run = bash(script, name, stdin=b"c\n", user=user, cwd="/tmp")
        assert sorted((await said(agent, run)).split()) == ["a", "b", "c", "d"]
    code = request("open('/dev/stdout', 'w').write(open('/dev/stdin').read())", "exec_3")
    assert await said(agent, dataclasses.replace(code, stdin=b"x")) == "x"


async def test_input_that_comes_while_it_runs(talk, agent):
    code = "import sys\nfor line in sys.stdin: print('got', line, end='', flush=True)\nprint('over')"
    run = dataclasses.replace(request(code), stdin_open=True, stdin=b"first\n")
    session = talk(agent, run)
    await session.sees("got first\n")
    assert await agent.stdin("exec_1", b"second\n", 6, False) == (13, True)
    await session.sees("got second\n")
    # The answer was lost, say, and it is sent again, with more behind it.
    assert await agent.stdin("exec_1", b"second\nthird\n", 6, False) == (19, True)
    assert await agent.stdin("exec_1", b"second\n", 6, False) == (19, True)
    with pytest.raises(AgentRefusedError) as refused:
        await agent.stdin("exec_1", b"x", 20, False)
    assert refused.value.agent_code == "bad_request"
    assert await agent.stdin("exec_1", b"last", None, True) == (23, False)
    assert await agent.stdin("exec_1", b"last", 19, True) == (23, False)
    await session.ends()
    assert session.seen == "got third\ngot lastover\n"
    with pytest.raises(AgentRefusedError) as refused:
        await agent.stdin("exec_1", b"more", None, False)
    assert refused.value.agent_code == "stdin_closed"
    with pytest.raises(AgentRefusedError) as refused:
        await agent.stdin("exec_unknown", b"", None, False)
    assert refused.value.agent_code == "unknown_exec"


async def test_input_that_nobody_reads_is_bounded_and_none_of_it_is_lost(talk, agent):
    session = talk(agent, bash("mkfifo /tmp/gate; echo up; read go </tmp/gate; wc -c", stdin_open=True))
    await session.sees("up\n")
    data = bytes(1 << 20)
    sent = 0
    async with asyncio.timeout(20):
        while True:
            size, _ = await agent.stdin("exec_1", data[sent:], sent, False)
            if size - sent < 256 * 1024:
                break
            sent = size
    # What the agent keeps, and what a pipe holds.
    assert 256 * 1024 <= size <= 384 * 1024
    await output(agent.run(bash("echo go >/tmp/gate", "exec_2")))
    async with asyncio.timeout(20):
        while size < len(data):
            size, _ = await agent.stdin("exec_1", data[size:], size, True)
    await session.ends()
    assert session.seen.strip() == str(len(data))


async def test_a_terminal(agent, settings):
    script = "tty; stty size; test -O $(tty) && echo mine; echo again >$(tty); echo $TERM"
    lines = (await said(agent, bash(script, pty=(30, 100)))).split("\r\n")
    assert lines[0].startswith("/dev/pts/")
    assert lines[1:5] == ["30 100", "mine", "again", "xterm-256color"]
    if settings.runtime != GVISOR:
        assert await said(agent, bash("echo here >/dev/tty", "exec_2", pty=(1, 1))) == "here\r\n"
        # Another program that opens a terminal inside, as tmux and script do.
        inner = "import os, pty; pty.spawn(['bash', '-c', 'tty; echo inner >$(tty); stty size'])"
        lines = (await said(agent, bash(f'python3 -c "{inner}"', "exec_3", pty=(30, 100)))).split()
        assert lines[0].startswith("/dev/pts/")
        assert lines[1] == "inner"
    with pytest.raises(AgentRefusedError) as refused:
        await agent.resize("exec_1", 24, 80)
    assert refused.value.agent_code == "no_terminal"


async def test_a_shell_in_a_terminal(talk, agent, settings):
    shell = dataclasses.replace(
        bash("", pty=(24, 80), env={"PS1": "READY> "}, timeout_s=60), argv=("bash", "--norc", "-i")
    )
    session = talk(agent, shell)
    await session.sees("READY> ")
    await agent.resize("exec_1", 50, 132)
    await session.type("stty size\n")
    await session.sees("50 132")
    await session.sees("READY> ")
    with pytest.raises(AgentRefusedError):
        await agent.resize("exec_1", 0, 80)
    if settings.runtime == GVISOR:
        await session.type("exit 4\n")
        assert (await session.ends()).exit_code == 4
        return
    await session.type("sleep 600\n")
    await session.sees("sleep 600")
    await settled(lambda: _runs(agent, "sleep"))
    await session.type("\x03")
    await session.sees(r"\^C")
    await session.sees("READY> ")
    await session.type("sleep 601 &\n")
    await session.sees(r"\[1\]")
    await session.type("fg\n")
    await session.sees("sleep 601\r\n")
    await settled(lambda: _is_in_front(agent, "sleep"))
    await session.type("\x1a")
    await session.sees("Stopped")
    await session.sees("READY> ")
    # The end of input, for a terminal, is typed: twice, because bash warns of the stopped job.
    await session.type("\x04")
    await session.sees("stopped jobs")
    await session.sees("READY> ")
    assert (await agent.stdin("exec_1", b"", None, True))[1] is False
    outcome = await session.ends()
    assert outcome.reason == "exit"
    assert not await _runs(agent, "sleep")


async def _runs(agent: Agent, program: str) -> bool:
    script = f"grep -lx {program} /proc/[0-9]*/comm 2>/dev/null | wc -l"
    return await said(agent, bash(script, f"exec_look_{next(_looks)}")) != "0\n"


async def _is_in_front(agent: Agent, program: str) -> bool:
    """Whether it is its terminal's foreground group: until then, Ctrl-Z is not for it."""
    fields = "pid name state parent group session terminal front rest"
    test = f"[ $name = '({program})' ] && [ $group = $front ] && echo yes"
    script = f"for file in /proc/[0-9]*/stat; do read -r {fields} <$file; {test}; done 2>/dev/null"
    return "yes" in await said(agent, bash(script, f"exec_look_{next(_looks)}"))


async def test_nothing_that_a_terminal_showed_at_the_end_is_lost(agent):
    many = "for i in $(seq 5000); do echo $i; done"
    text = await said(agent, bash(many, pty=(24, 80)))
    assert text.split() == [str(number) for number in range(1, 5001)]
    # Who has the terminal and goes on with it does not hold up the end, and ends, too.
    script = "setsid sleep 600 <$(tty) >$(tty) 2>&1 & echo last; exit 7"
    data, outcome = await output(agent.run(bash(script, "exec_2", pty=(24, 80))))
    assert (data, outcome.exit_code) == (b"last\r\n", 7)
    # One that gives its terminal up and takes it again has not ended.
    closing = "t=$(tty); exec </dev/null >/dev/null 2>&1; sleep 0.2; exec >$t; echo back"
    assert await said(agent, bash(closing, "exec_3", pty=(24, 80))) == "back\r\n"
    assert not await _runs(agent, "sleep")


async def test_a_killed_terminal_takes_all_with_it(talk, agent):
    script = "trap '' HUP TERM; setsid sleep 602 & sleep 603 & echo up; wait"
    session = talk(agent, bash(script, pty=(24, 80)))
    await session.sees("up")
    assert await agent.signal("exec_1", signal.SIGKILL) is True
    outcome = await session.ends()
    assert (outcome.reason, outcome.signal) == ("killed", 9)
    assert not await _runs(agent, "sleep")


async def test_signals(talk, agent):
    script = "trap 'echo usr; exit 5' USR1; echo up; while :; do sleep 0.05; done"
    session = talk(agent, bash(script))
    await session.sees("up")
    assert await agent.signal("exec_1", signal.SIGUSR1) is True
    outcome = await session.ends()
    assert (session.seen.endswith("usr\n"), outcome.exit_code, outcome.reason) == (True, 5, "exit")
    assert await agent.signal("exec_1", signal.SIGTERM) is False
    # All of its group, not only its first process.
    session = talk(agent, bash("sleep 604 & echo up; wait; echo never", "exec_2"))
    await session.sees("up")
    assert await agent.signal("exec_2", signal.SIGTERM) is True
    outcome = await session.ends()
    assert (outcome.reason, outcome.signal) == ("exit", 15)
    with pytest.raises(AgentRefusedError) as refused:
        await agent.signal("exec_unknown", signal.SIGTERM)
    assert refused.value.agent_code == "unknown_exec"
    with pytest.raises(AgentRefusedError) as refused:
        await agent.signal("exec_2", 4711)
    assert refused.value.agent_code == "bad_request"
    code = "import time\ntry:\n  print('up'); time.sleep(600)\nexcept KeyboardInterrupt: print('interrupted')"
    session = talk(agent, request(code, "exec_3"))
    await session.sees("up\n")
    await agent.signal("exec_3", signal.SIGINT)
    outcome = await session.ends()
    assert (session.seen, outcome.exit_code) == ("interrupted\n", 0)


async def test_nobody(talk, agent):
    secrets = "echo secret >/home/user/s; umask 077; echo mine >/tmp/mine"
    await output(agent.run(bash(secrets, "exec_0")))
    sleeper = talk(agent, bash("echo $$; sleep 605", "exec_1"))
    pid = (await sleeper.sees(r"\d+\n")).strip()
    script = f"""
        id -un; id -u; echo $HOME $USER; pwd; touch /tmp/ours && echo done
        may() {{ "$@" >/dev/null 2>&1 && echo "$@"; }}
        may ls /home/user; may cat /home/user/s; may touch /home/user/x
        may cat /tmp/mine; may rm -f /tmp/mine; may kill {pid}; may ls /proc/{pid}/fd
        may cat /run/e80/config.json; may touch /etc/x; may true
    """
    lines = (await said(agent, bash(script, "exec_2", user="nobody", cwd="/tmp"))).splitlines()
    assert lines == ["nobody", "293000", "/tmp nobody", "/tmp", "done", "true"]
    # As its own user it finds what is its own, and the first user finds it there.
    look = (
        "import os, pwd; print(pwd.getpwuid(os.stat('/tmp/ours').st_uid).pw_name, open('/tmp/mine').read())"
    )
    assert await said(agent, request(look, "exec_3")) == "nobody mine\n\n"
    code = (
        "import os, getpass; print(os.getresuid(), os.getgid(), getpass.getuser(), os.path.expanduser('~'))"
    )
    for number, fresh in enumerate((False, True)):
        run = dataclasses.replace(request(code, f"exec_4{number}"), user="nobody", cwd="/tmp", fresh=fresh)
        assert await said(agent, run) == "(293000, 293000, 293000) 293000 nobody /tmp\n"
    with pytest.raises(AgentRefusedError) as refused:
        await said(agent, bash("id", "exec_5", user="root"))
    assert refused.value.agent_code == "bad_request"
    assert sleeper.outcome is None
    await agent.signal("exec_1", signal.SIGKILL)
    await sleeper.ends()


async def test_what_nobody_starts_ends_with_it_and_leaves_room_for_others(talk, agent):
    bomb = "import os, time\nprint('up')\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(0.1)"
    run = dataclasses.replace(request(bomb, timeout_s=2), user="nobody", cwd="/tmp")
    session = talk(agent, run)
    await session.sees("up")
    assert await said(agent, bash("echo a | cat | cat", "exec_2")) == "a\n"
    assert (await session.ends()).reason == "timeout"
    script = "grep -l '^Uid:.*293000' /proc/[0-9]*/status 2>/dev/null | wc -l"
    assert await said(agent, bash(script, "exec_3")) == "0\n"


async def test_a_log_of_the_newest_output(agent):
    script = "for i in $(seq 2000); do printf '%0999d\\n' $i; done"
    run = bash(script, ring=True, output_limit=100_000, spool_limit=8 << 20)
    ends = [(event, end) async for event, end in agent.start(run)]
    outcome = ends[-1][0]
    assert isinstance(outcome, Outcome)
    assert outcome.truncated
    total = sum(len(event.data) for event, _ in ends if isinstance(event, Output))
    missed = sum(event.missed_bytes for event, _ in ends if isinstance(event, Gap))
    assert total + missed == 2000 * 1000
    offsets = [end for _, end in ends]
    assert offsets == sorted(set(offsets))
    # Whoever comes later finds the end, at the same offsets.
    late = [(event, end) async for event, end in agent.follow("exec_1")]
    gap = late[0][0]
    assert isinstance(gap, Gap)
    kept = b"".join(event.data for event, _ in late if isinstance(event, Output))
    assert len(kept) + gap.missed_bytes == 2000 * 1000
    assert 70_000 < len(kept) <= 100_000
    assert kept.endswith(b"%0999d\n" % 2000)
    assert set(late[1:]) <= set(ends) or any(isinstance(event, Gap) for event, _ in ends)
    assert late[-1] == ends[-1]
    again = [item async for item in agent.follow("exec_1", late[3][1])]
    assert again == late[4:]
    read = await agent.read_log("exec_1")
    assert read == [event for event, _ in late]
    # The file in the sandbox has all of it.
    assert await said(agent, bash(f"wc -c <{outcome.spool}/stdout", "exec_2")) == "2000000\n"


async def test_a_terminal_outlives_its_daemon_and_a_pause(talk, runtime, settings):
    earlier = create_runtime(settings)
    await earlier.start()
    handle = await earlier.create(await make_spec(earlier))
    script = 'echo up; while read line && [ $line != end ]; do echo "got $line"; done; echo over'
    shell = bash(script, pty=(24, 80), timeout_s=None, ring=True)
    first = talk(agent_of(earlier), shell)
    await first.sees("up")
    await first.type("one\n")
    await first.sees("got one")
    await first.leave()
    await earlier.close()
    await runtime.adopt(SANDBOX, handle)
    agent = agent_of(runtime)
    (known,) = (await agent.hello()).execs
    assert (known.ring, known.finished, known.left_s) == (True, False, None)
    await agent.timers(False)
    await runtime.pause(SANDBOX)
    await runtime.resume(SANDBOX)
    await agent.timers(True)
    await agent.stdin("exec_1", b"two\nend\n", None, False)
    async with asyncio.timeout(20):
        data, outcome = await output(agent.attach("exec_1"))
    assert re.findall(rb"got \w+|over", data) == [b"got one", b"got two", b"over"]
    assert outcome.exit_code == 0


async def test_a_signal_that_comes_before_the_process_is_not_lost(agent):
    starting = [
        asyncio.ensure_future(output(agent.run(request("import time; time.sleep(30)", f"exec_{n}"))))
        for n in range(8)
    ]
    for number in range(8):
        delivered = False
        async with asyncio.timeout(20):
            while not delivered:
                with contextlib.suppress(AgentRefusedError):
                    delivered = await agent.signal(f"exec_{number}", signal.SIGTERM)
    outcomes = [outcome for _, outcome in await asyncio.wait_for(asyncio.gather(*starting), 20)]
    assert {(outcome.reason, outcome.signal) for outcome in outcomes} == {("exit", 15)}
