"""`sandboxd stop-all`: everything of this installation ends, and nothing of any other."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.docker


def stop_all(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandboxd", "stop-all"], env=env, capture_output=True, text=True, timeout=60
    )


def test_it_ends_all_and_only_while_no_daemon_runs(own_daemon, engine, sandbox_id):
    own_daemon.stop()
    own_daemon.start(SANDBOXD_POOL_SIZE="2", SANDBOXD_POOL_MAX="2", SANDBOXD_WARM_LIBRARIES="false")
    with own_daemon.client() as http:
        mine = http.post("/v1/sandboxes", json={"memory_size_mb": 128}).json()["id"]
        refused = stop_all(own_daemon.env)
        assert refused.returncode == 1
        assert "another sandboxd runs" in refused.stderr
    own_daemon.stop()
    done = stop_all(own_daemon.env)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "stopped 1 sandboxes"), done.stderr
    owner = (own_daemon.state_dir / "installation").read_text().strip()
    assert engine.containers.list(all=True, filters={"label": f"sandboxd.owner={owner}"}) == []
    assert list((own_daemon.state_dir / "workspaces").iterdir()) == []
    # Another installation's sandbox lives on.
    assert engine.containers.get(sandbox_id).status == "running"
    own_daemon.start(SANDBOXD_POOL_MAX="0")
    with own_daemon.client() as http:
        ended = http.get(f"/v1/sandboxes/{mine}").json()
    assert (ended["status"], ended["termination_reason"]) == ("stopped", "user")
