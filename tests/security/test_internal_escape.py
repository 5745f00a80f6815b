"""InternalEsc: tenant code against the agent that runs it, and against the end of its own exec."""

import json
import threading
import time

import pytest

from tests.conftest import IMAGE, Daemon
from tests.security.arena import SYSCALLS, Box, until

pytestmark = pytest.mark.docker

# Every process of root, and one of the tenant's own to compare with.
TARGETS = """
def targets():
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat("/proc/" + name).st_uid == 0:
                found.append(int(name))
        except OSError:
            continue
    return found
"""

HELPERS = """
def fail(answer):
    if answer != "OK":
        raise OSError(getattr(errno, answer), "")
QUEUED = ctypes.create_string_buffer(128)
QUEUED[8:12] = bytes([255]) * 4  # SI_QUEUE: the code of a signal that a user sends
"""

ON_PROCESSES = {
    "SIGKILL": "os.kill(pid, 9)",
    "SIGSTOP": "os.kill(pid, 19)",
    "no signal": "os.kill(pid, 0)",
    "signal by a descriptor": "fail(call(424, os.pidfd_open(pid), 9, 0, 0))",
    "queued signal": "fail(call(129, pid, 9, ctypes.addressof(QUEUED)))",
    "signal to the thread": "fail(call(234, pid, pid, 9))",
    "memory": "open('/proc/%d/mem' % pid, 'rb')",
    "memory, to write": "open('/proc/%d/mem' % pid, 'wb')",
    "map": "open('/proc/%d/maps' % pid).read(1)",
    "environment": "open('/proc/%d/environ' % pid).read(1)",
    "auxiliary vector": "open('/proc/%d/auxv' % pid, 'rb').read(1)",
    "pages": "open('/proc/%d/pagemap' % pid, 'rb')",
    "stack": "open('/proc/%d/stack' % pid).read(1)",
    "system call": "open('/proc/%d/syscall' % pid).read(1)",
    "descriptors": "os.listdir('/proc/%d/fd' % pid)",
    "a descriptor": "open('/proc/%d/fd/0' % pid)",
    "working folder": "os.listdir('/proc/%d/cwd' % pid)",
    "root": "os.listdir('/proc/%d/root' % pid)",
    "program": "os.readlink('/proc/%d/exe' % pid)",
    "namespaces": "os.readlink('/proc/%d/ns/pid' % pid)",
    "out-of-memory score": "open('/proc/%d/oom_score_adj' % pid, 'w').write('1000')",
    "dump filter": "open('/proc/%d/coredump_filter' % pid, 'w').write('0')",
    "name": "open('/proc/%d/comm' % pid, 'w').write('mine')",
    "scheduler": "os.sched_setaffinity(pid, {0})",
    "scheduling class": "os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))",
    "priority": "os.setpriority(os.PRIO_PROCESS, pid, 19)",
    "limits": "__import__('resource').prlimit(pid, 7, (1, 1))",
    "input/output priority": "fail(call(251, 1, pid, 0))",
    "robust futexes": "fail(call(274, pid, ctypes.addressof(QUEUED), ctypes.addressof(QUEUED) + 8))",
}


@pytest.mark.parametrize("attack", ON_PROCESSES)
def test_nothing_can_be_done_to_the_agent(attacker, attack):
    """PID 1, the parent interpreters and the children forked ahead: all root's, all out of reach."""
    answers = attacker.ask(
        TARGETS
        + HELPERS
        + f"""
def strike(pid):
    {ON_PROCESSES[attack]}
answers = {{}}
for pid in targets():
    answer = attempt(strike, pid)
    if os.path.exists("/proc/%d" % pid):
        answers[pid] = answer
print(json.dumps([answers, attempt(strike, os.getppid())]))
"""
    )[0]
    assert "1" in answers
    assert len(answers) >= 2
    assert set(answers.values()) <= {"EPERM", "EACCES"}, answers


def test_the_same_can_be_done_where_nothing_holds_it(engine):
    """The attacks bite: without our walls, and with one uid for both sides, next to all of them succeed."""
    strikes = "".join(f"    def s{n}(pid): {attack}\n" for n, attack in enumerate(ON_PROCESSES.values()))
    code = f"""
import signal, time
if True:
{strikes}
answers = []
for number in range({len(ON_PROCESSES)}):
    pid = os.fork()
    if pid == 0:
        while True: signal.pause()
    answers.append(attempt(locals()["s%d" % number], pid))
    os.kill(pid, signal.SIGKILL)
    os.wait()
print(json.dumps(answers))
"""
    output = engine.containers.run(
        IMAGE,
        ["python3", "-c", SYSCALLS + HELPERS + code],
        user="0:0",
        cap_add=["SYS_PTRACE"],
        security_opt=["seccomp=unconfined"],
        remove=True,
    )
    refused = [name for name, answer in zip(ON_PROCESSES, json.loads(output), strict=True) if answer != "OK"]
    # Reading a stack needs SYS_ADMIN, also of one's own.
    assert set(refused) <= {"stack"}, refused


def test_the_agent_survived_all_that(arena):
    arena.assert_unharmed()
    assert arena.attacker.status() == "running"


def test_signals_that_the_kernel_sends_for_others(arena):
    """Data on a pipe, a lease, an exit: the kernel signals whom the tenant names, if the tenant may."""
    answer = arena.attacker.ask(
        """
import fcntl, signal
reader, writer = os.pipe()
own = attempt(fcntl.fcntl, reader, fcntl.F_SETOWN, 1)
attempt(fcntl.fcntl, reader, 10, signal.SIGKILL)  # F_SETSIG
fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
os.write(writer, b"x")
if os.fork() == 0:
    call(56, 9, 0, 0, 0, 0)  # a child whose exit sends SIGKILL to its parent, which then is the agent
    os._exit(0)
os.wait()
print(json.dumps(own))
"""
    )
    assert answer in ("OK", "EPERM")
    arena.assert_unharmed()


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ("socket.socket(socket.AF_UNIX).connect('/run/e80/agent.sock')", "EACCES"),
        ("open('/run/e80/config.json')", "EACCES"),
        ("open('/run/e80/config.json', 'w')", "EROFS EACCES"),
        ("os.chmod('/run/e80/config.json', 0o666)", "EROFS"),
        ("os.unlink('/run/e80/agent.sock')", "EROFS EACCES"),
        ("os.rename('/run/e80/agent.sock', '/run/e80/old')", "EROFS EACCES"),
        ("os.symlink('/tmp/mine.sock', '/run/e80/agent.sock.new')", "EROFS EACCES"),
        ("os.link('/run/e80/agent.sock', '/tmp/agent.sock')", "EXDEV EPERM"),
        ("socket.socket(socket.AF_UNIX).bind('/run/e80/mine.sock')", "EROFS EACCES"),
        ("os.listdir('/run/e80')", "EACCES"),
        ("open('/opt/e80/e80_agent/main.py', 'a')", "EROFS EACCES"),
    ],
)
def test_the_link_cannot_be_taken(attacker, attack, expected):
    assert attacker.ask(f"import socket; print(json.dumps(attempt(lambda: {attack})))") in expected.split()


def test_the_key_is_in_no_process_that_can_be_read(arena):
    """Commands, runs, file helpers and fresh interpreters start while the attacker reads all the memory it
    may: none of them ever holds the key of the link while it is the tenant's to read."""
    key = json.loads((arena.attacker.link_dir / "config.json").read_bytes())["key"]
    hunt = f"""
import os, time
raw = bytes.fromhex({key!r})
needles = (raw, {key!r}.encode())
found, looked = [], set()
end = time.monotonic() + 4
while time.monotonic() < end:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            maps = open("/proc/%s/maps" % pid).read()
            with open("/proc/%s/mem" % pid, "rb", buffering=0) as memory:
                for line in maps.splitlines():
                    area = line.split()
                    if "rw" in area[1]:
                        start, stop = (int(text, 16) for text in area[0].split("-"))
                        memory.seek(start)
                        data = memory.read(min(stop - start, 1 << 24))
                        # The code of this very exec holds it, too, and forks of it would.
                        if any(needle in data for needle in needles):
                            found.append(open("/proc/%s/cmdline" % pid).read())
            looked.add(pid)
        except (OSError, ValueError, OverflowError):
            continue
print(len(looked), found)
"""
    running = arena.attacker.in_background(hunt, timeout_s=20)
    while not running.over:
        arena.attacker.run("import time; time.sleep(0.05)")
        arena.attacker.run(command=["sleep", "0.05"])
        arena.attacker.run("import time; time.sleep(0.05)", fresh=True)
        assert arena.put("hunt.bin", b"x" * 100_000).status_code in (200, 201)
        assert arena.get("hunt.bin").status_code == 200
    looked, _, found = running.result()["stdout"].strip().partition(" ")
    assert int(looked) > 3
    assert found == "[]"


PLANTED = "import os; open('/tmp/planted', 'a').write('%d\\n' % os.getuid())\n"
PLACES = [
    ".local/lib/python{version}/site-packages/evil.pth",
    ".local/lib/python{version}/site-packages/usercustomize.py",
    ".local/lib/python{version}/site-packages/sitecustomize.py",
    ".local/lib/python{version}/site-packages/numpy.py",
    "numpy.py",
    "pandas.py",
    "sitecustomize.py",
    "usercustomize.py",
    "json.py",
    "/tmp/numpy.py",
    "/tmp/sitecustomize.py",
    "/tmp/e80_agent/__init__.py",
]


def test_no_code_of_the_tenant_runs_in_a_parent(own_daemon: Daemon, engine):
    """Planted before the warm parent starts: its imports, its start-up and its files are all tried."""
    own_daemon.stop()
    own_daemon.env["SANDBOXD_WARM_LIBRARIES"] = "false"
    own_daemon.start()
    with own_daemon.client() as client:
        box = Box(client, engine, client.post("/v1/sandboxes", json={}).json()["id"])
        version = box.ask("print(json.dumps('%d.%d' % sys.version_info[:2]))")
        for place in PLACES:
            path = place.format(version=version)
            planted = PLANTED if path.endswith(".pth") else PLANTED + "raise ImportError\n"
            answer = client.put(f"/v1/sandboxes/{box.id}/files", params={"path": path}, content=planted)
            assert answer.status_code == 201, answer.text
        # What libraries read when they are imported: a pipe in its place would hold them for ever.
        box.run(command="mkdir -p .config/matplotlib; mkfifo .config/matplotlib/matplotlibrc matplotlibrc")
        env = {"PYTHONPATH": "/tmp", "LD_PRELOAD": "/tmp/evil.so", "PYTHONSTARTUP": "/tmp/numpy.py"}
        box.run("print('numpy')", env=env)
        box.run("print('numpy pandas matplotlib')", cwd="/tmp")

        def warm() -> bool:
            return sum(process.uid == 0 for process in box.processes()) >= 5

        assert until(warm, 20), box.processes()
        planted_by = box.run(command="cat /tmp/planted || true")["stdout"].split()
        assert set(planted_by) <= {str(box.uid)}
        assert planted_by, "nothing planted ran at all, so the test shows nothing"
        roots = [process.pid for process in box.processes() if process.uid == 0]
        for pid in roots:
            with open(f"/proc/{pid}/maps") as maps:
                assert not [line for line in maps if "/home/user" in line or "/tmp/" in line]
        assert box.ask("print(json.dumps([os.stat('/tmp').st_uid, os.stat('/tmp').st_mode & 0o7777]))") == [
            0,
            0o1777,
        ]
        owners = box.ask("print(json.dumps([os.stat('/tmp/' + name).st_uid for name in os.listdir('/tmp')]))")
        assert set(owners) == {box.uid}, "root left something in the tenant's reach"


# Each returns at once or never; none may leave anything behind either way.
DETACHED = {
    "setsid and double fork": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        close(); time.sleep(1000)
    os._exit(0)
""",
    "all signals ignored": """
if os.fork() == 0:
    os.setsid()
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    close(); time.sleep(1000)
""",
    "stopped": """
if os.fork() == 0:
    os.setsid(); close(); os.kill(os.getpid(), signal.SIGSTOP)
""",
    "first thread ended": """
import ctypes, threading
if os.fork() == 0:
    os.setsid(); close()
    threading.Thread(target=time.sleep, args=(1000,)).start()
    ctypes.CDLL(None).syscall(60, 0)
""",
    "one child after the other": """
if os.fork() == 0:
    os.setsid(); close()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if os.fork(): os._exit(0)
        except OSError: pass
    time.sleep(1000)
""",
    "vfork and another program": """
import subprocess
subprocess.Popen(["sleep", "1000"], start_new_session=True, close_fds=True,
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
""",
    "a shell that disowns": """
os.system("(trap '' TERM HUP INT; nohup setsid sleep 1000 >/dev/null 2>&1 </dev/null &)")
""",
    "a name like a status": """
import ctypes
if os.fork() == 0:
    os.setsid(); close()
    ctypes.CDLL(None).prctl(15, b"\\nState:\\tZ\\nGroups:")
    time.sleep(1000)
""",
    "a terminal of its own": """
import pty
pid, fd = pty.fork()
if pid == 0:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    time.sleep(1000)
""",
    "many": """
for _ in range(100):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            close(); time.sleep(1000)
        os._exit(0)
""",
}
PREAMBLE = """
import os, signal, time
def close():
    for fd in range(10):
        try: os.close(fd)
        except OSError: pass
"""


@pytest.mark.parametrize("way", DETACHED)
def test_what_is_left_behind_ends_with_the_exec(arena, way):
    result = arena.attacker.run(PREAMBLE + DETACHED[way] + "\nprint('left')", timeout_s=10)
    assert (result["status"], result["stdout"]) == ("completed", "left\n"), result
    assert arena.attacker.tenants() == []
    arena.assert_unharmed()


@pytest.mark.parametrize("way", DETACHED)
def test_what_is_left_behind_ends_with_the_timeout(arena, way):
    result = arena.attacker.run(PREAMBLE + DETACHED[way] + "\nwhile True: time.sleep(1)", timeout_s=1)
    assert result["status"] == "timed_out", result
    assert result["duration_ms"] < 2500
    arena.assert_unharmed()


BOMBS = {
    "processes": """
import os, signal
for number in (1, 2, 3, 15, 18, 20): signal.signal(number, signal.SIG_IGN)
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass
""",
    "threads": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: pass
""",
    "a shell": "import os\nos.execvp('bash', ['bash', '-c', 'bomb() { bomb | bomb & }; bomb; sleep 1000'])",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_at_its_timeout_and_others_run_meanwhile(arena, bomb, daemon):
    running = arena.attacker.in_background(BOMBS[bomb], timeout_s=2.5)
    limit = arena.attacker.facts["HostConfig"]["PidsLimit"]
    peak = 0

    def full() -> bool:
        nonlocal peak
        peak = max(peak, len(arena.attacker.tenants()))
        return peak > 100 or running.over

    until(full, 2)
    meanwhile = arena.attacker.run("print('still')", timeout_s=20)
    assert (meanwhile["status"], meanwhile["stdout"]) == ("completed", "still\n")
    result = running.result()
    reasons = [line for line in daemon.log.splitlines() if "link_lost" in line]
    assert (result["status"], result["signal"]) == ("timed_out", "SIGKILL"), (result, reasons)
    assert result["duration_ms"] < 2500 + 3000
    assert peak <= limit
    arena.assert_unharmed()


def test_a_tenant_that_stops_all_it_can_stops_nobody_else(arena):
    """It sends SIGSTOP to every process of its uid: programs about to start, helpers of files and output."""
    stopper = arena.attacker.in_background(
        """
import os, signal, time
end = time.monotonic() + 30
while time.monotonic() < end:
    try: os.kill(-1, signal.SIGSTOP)
    except ProcessLookupError: pass
""",
        timeout_s=3,
    )
    assert until(lambda: bool(arena.attacker.tenants()), 5)
    commands = [arena.attacker.in_background(command=["true"], timeout_s=2) for _ in range(4)]
    while not stopper.over:
        started = time.monotonic()
        assert arena.put("stop.bin", b"x" * 100_000).status_code in (200, 201)
        assert arena.get("stop.bin").content == b"x" * 100_000
        assert time.monotonic() - started < 3
    result = stopper.result()
    assert (result["status"], result["duration_ms"] < 5000) == ("timed_out", True), result
    for command in commands:
        assert command.result()["status"] in ("completed", "timed_out")
    arena.assert_unharmed()


def test_killing_all_it_can_leaves_the_agent(arena):
    result = arena.attacker.run(
        """
import os, time
end = time.monotonic() + 1
while time.monotonic() < end:
    try: os.kill(-1, 9)
    except ProcessLookupError: pass
""",
        timeout_s=10,
    )
    assert result["status"] == "completed"
    arena.assert_unharmed()


def test_a_pipe_that_another_exec_keeps_writing_to(arena):
    """The first exec hands its stdout to a second one and ends: its end must not wait for the writer."""
    taker = arena.attacker.in_background(
        """
import array, os, socket
server = socket.socket(socket.AF_UNIX); server.bind("/tmp/hand.sock"); server.listen()
connection, _ = server.accept()
_, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4))
fd = array.array("i", ancillary[0][2])[0]
for _ in range(4):
    if os.fork() == 0:
        break
while True:
    try: os.write(fd, b"x" * 65536)
    except OSError: break
""",
        timeout_s=3,
    )
    giver = """
import array, os, socket, time
connection = socket.socket(socket.AF_UNIX)
for _ in range(200):
    try: connection.connect("/tmp/hand.sock"); break
    except OSError: time.sleep(0.02)
connection.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
time.sleep(0.3)
"""
    given = arena.attacker.run(giver, timeout_s=10)
    assert given["status"] == "completed"
    assert given["duration_ms"] < 6000
    taker.result()
    arena.attacker.run(command=["rm", "-f", "/tmp/hand.sock"])
    arena.assert_unharmed()


@pytest.mark.parametrize("target", ["/opt/e80", "/run/e80", "/proc/1", "/etc", "/dev/shm", "/tmp/file"])
def test_the_folder_of_long_outputs_as_a_link(arena, target):
    """Output beyond the cap goes to a file of the tenant's: where it lies is up to the tenant's rights."""
    arena.attacker.run(
        command=f"touch /tmp/file; rm -rf ~/.8080; mkdir ~/.8080; ln -s {target} ~/.8080/execs"
    )
    result = arena.attacker.run("print('x' * 6_000_000)", timeout_s=20)
    assert (result["status"], result["truncated"]) == ("completed", True)
    assert (result["output_path"] is None) == (target != "/dev/shm")
    arena.attacker.run(command="rm -rf ~/.8080 /tmp/file /dev/shm/exec_*")
    arena.assert_unharmed()


HOSTILE_ERRORS = {
    "half a document": "b'{' * 200_000",
    "deep nesting": "b'[' * 100_000 + b']' * 100_000",
    "half characters": 'b\'{"name": "\\\\\\\\ud800", "value": "\\\\\\\\udfff", "traceback": 5}\'',
    "no numbers": 'b\'{"name": NaN, "value": 1e999, "traceback": -Infinity}\'',
    "a large number": "b'9' * 10_000",
    "megabytes": "b'x' * 10_000_000",
}


@pytest.mark.parametrize("kind", HOSTILE_ERRORS)
def test_what_a_tenant_says_of_its_own_error_is_only_text(arena, kind):
    code = f"import os, sys\ntry: os.write(3, {HOSTILE_ERRORS[kind]})\nexcept OSError: pass\nos._exit(3)"
    result = arena.attacker.run(code, timeout_s=20)
    assert (result["status"], result["exit_code"]) == ("failed", 3)
    assert result["error"] is None or len(json.dumps(result["error"])) < 600_000
    arena.assert_unharmed()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("raise ValueError('\\U0001f600' * 1_000_000)", "ValueError"),
        ("E = type('n' * 1_000_000, (Exception,), {})\nraise E('x')", "n" * 200),
        ("def f(): f()\nf()", "RecursionError"),
        ("class E(Exception):\n    def __str__(self): raise OSError\nraise E", "E"),
        ("raise ExceptionGroup('g', [ValueError(i) for i in range(20_000)])", "ExceptionGroup"),
        ("import sys\nsys.stderr = None\nraise KeyError(1)", "KeyError"),
        ("import os\nos.close(2); os.close(1)\nraise KeyError(1)", "KeyError"),
    ],
)
def test_errors_of_any_size_are_told(arena, code, name):
    result = arena.attacker.run(code, timeout_s=20)
    assert (result["status"], result["exit_code"]) == ("failed", 1), result
    assert result["error"]["name"] == name
    arena.assert_unharmed()


def test_files_are_served_by_nobody_the_tenant_can_touch(arena):
    """The helpers of uploads act as the tenant without being its process."""
    watcher = arena.attacker.in_background(
        """
import os, time
seen = set()
end = time.monotonic() + 2
while time.monotonic() < end:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = open("/proc/%s/status" % pid).read()
            uids = status.partition("\\nUid:")[2].split("\\n")[0].split()
            if uids[1] == str(os.getuid()) and uids[0] == "0":
                for attack in (lambda: os.kill(int(pid), 9), lambda: open("/proc/%s/mem" % pid, "rb")):
                    try: attack(); seen.add("OK")
                    except OSError as error: seen.add(error.errno)
        except OSError:
            continue
print(sorted(map(str, seen)))
""",
        timeout_s=10,
    )
    stop = threading.Event()

    def slow_upload():
        def chunks():
            while not stop.wait(0.05):
                yield b"x" * 1000

        return arena.client.put(
            f"/v1/sandboxes/{arena.attacker.id}/files", params={"path": "slow.bin"}, content=chunks()
        )

    uploads = []
    thread = threading.Thread(target=lambda: uploads.append(slow_upload()))
    thread.start()
    seen = watcher.result()["stdout"].strip()
    stop.set()
    thread.join(20)
    assert uploads[0].status_code == 201
    assert seen == "['1', '13']"  # EPERM, EACCES
    arena.assert_unharmed()
