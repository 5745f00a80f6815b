"""SelfDoS: what a tenant does to its own sandbox must not need a new one, as far as we can help it."""

import pytest

from tests.security.arena import until
from tests.security.conftest import new_box

pytestmark = pytest.mark.docker

VANDALISM = {
    "all files": "rm -rf ~/* ~/.[a-z]* /tmp/* /dev/shm/*",
    "a home that cannot be entered": "chmod 000 ~",
    "a shell that ends at once": "echo 'exit 7' > ~/.bash_profile; echo 'exit 7' > ~/.bashrc",
    "programs of the same names": "mkdir -p ~/.local/bin; for n in bash sh python3 ls; do"
    " printf '#!/bin/false\\n' > ~/.local/bin/$n; chmod +x ~/.local/bin/$n; done",
    "modules of the same names": "for n in json site traceback os sys numpy; do"
    " echo 'raise SystemExit(9)' > ~/$n.py; done",
    "a start-up file that ends Python": "d=$(python3 -m site --user-site); mkdir -p $d;"
    " echo 'import os; os._exit(9)' > $d/evil.pth",
}
REPAIR = "chmod 755 ~; rm -rf ~/* ~/.[a-z]*"


@pytest.mark.parametrize("kind", VANDALISM)
def test_a_tenant_can_repair_what_it_has_broken(arena, kind):
    """Some of these break the runs that follow, as they would on any machine; never the sandbox."""
    arena.attacker.run(command=VANDALISM[kind], timeout_s=20)
    arena.attacker.exec(code="print(1)", timeout_s=10)
    repaired = arena.attacker.run(command=["/bin/sh", "-c", REPAIR], cwd="/tmp", timeout_s=10)
    assert repaired["status"] == "completed", repaired
    arena.assert_unharmed()


def test_a_sandbox_that_starves_its_own_agent_ends_and_says_why(arena, engine):
    """Not contained: memory that is nobody's (a file in memory) and a score as low as the agent's leave the
    kernel with the agent as the largest process. It ends this sandbox, and nothing else."""
    box = new_box(arena.client, engine, memory_size_mb=256)
    running = box.in_background(
        """
import os, signal, time
open("/proc/self/oom_score_adj", "w").write("500")
fd = os.memfd_create("x")
while True:
    try: os.write(fd, b"x" * (1 << 20))
    except OSError: pass
""",
        timeout_s=20,
    )
    assert running.result()["status"] in ("oom", "killed", "timed_out", "lost")
    assert until(lambda: box.status() in ("running", "failed"), 20)
    facts = arena.client.get(f"/v1/sandboxes/{box.id}").json()
    if facts["status"] == "failed":
        assert facts["termination_reason"] == "oom"
    arena.client.post(f"/v1/sandboxes/{box.id}/stop")
    arena.assert_unharmed()


EXHAUSTION = {
    "descriptors": "import os\nwhile True: os.dup(0)",
    "recursion in C": """
import sys
sys.setrecursionlimit(10**9)
class A:
    def __repr__(self): return repr(self)
repr(A())
""",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "an abort": "import os\nos.abort()",
    "its own output closed": "import os\nos.closerange(0, 100)\n1/0",
    "an exit in a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(5,)).start()",
    "an endless exit": "import atexit, time\natexit.register(time.sleep, 1000)",
    "a thread that never ends": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "SIGKILL to itself": "import os\nos.kill(os.getpid(), 9)",
    "a stop": "import os\nos.kill(os.getpid(), 19)",
}
ENDLESS = {"an endless exit", "a thread that never ends", "a stop"}


@pytest.mark.parametrize("kind", EXHAUSTION)
def test_a_run_that_ends_badly_is_only_that(arena, kind):
    result = arena.attacker.run(EXHAUSTION[kind], timeout_s=1.5)
    assert result["status"] == ("timed_out" if kind in ENDLESS else "failed"), result
    arena.assert_unharmed()
