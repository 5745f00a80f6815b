"""A Docker Engine of a test's own, which it may restart and kill, with a small image for sandboxes.

Usable without pytest: `with own_engine() as engine: ...`; at the end nothing of it is left.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docker

IMAGE = "e80-test/python:latest"
RUNSC = "/usr/bin/runsc"
# ptrace: the test machine may have no KVM. host-uds: the agent dials a socket of the host.
RUNSC_ARGUMENTS = ["--platform=ptrace", "--network=none", "--host-uds=open"]
_FULL_IMAGE = "e80/default:latest"
_START_S = 60
_STOP_S = 60

# Runs in the full image: Python, its standard library, a shell and the libraries of both, as a tar archive.
_PACK = """
import os, shutil, subprocess, sys, sysconfig, tarfile
programs = 'python3 bash sh env cat ls stat id echo sleep true mkdir rm cp mv ln chmod touch dd ps'.split()
programs += 'grep mkfifo seq setsid stty tee tty wc'.split()
paths = {shutil.which(name) for name in programs} - {None}
stdlib = sysconfig.get_path('stdlib')
modules = [os.path.join(stdlib, 'lib-dynload', name) for name in os.listdir(stdlib + '/lib-dynload')]
told = subprocess.run(['ldd', *paths, *modules], capture_output=True, text=True).stdout
paths |= {word for word in told.split() if word.startswith('/') and not word.endswith(':')}
paths |= {os.path.realpath(path) for path in paths}
# Below a link of the merged /usr a file is packed where it really is.
paths = {os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in paths}
small = lambda info: None if info.name.endswith(('/dist-packages', '/test')) else info
with tarfile.open(fileobj=sys.stdout.buffer, mode='w|') as archive:
    for name in 'bin sbin lib lib64 tmp etc home run opt proc sys dev'.split():
        archive.add('/' + name, recursive=False)
    for path in sorted(paths):
        archive.add(path, recursive=False)
    archive.add(stdlib, filter=small)
"""
_PACK_COMMAND = ["docker", "run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "python3"]


@dataclass
class OwnEngine:
    """One dockerd with all of its state in one folder."""

    root: Path
    settings: dict[str, object]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def socket(self) -> Path:
        return self.root / "docker.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def log(self) -> str:
        return (self.root / "dockerd.log").read_text(errors="replace")

    def start(self) -> None:
        """Starts it and waits until it answers."""
        (self.root / "daemon.json").write_text(json.dumps(self.settings))
        # Left by a kill, this file keeps the engine from starting.
        for name in ("docker.pid", "exec/containerd/containerd.pid"):
            (self.root / name).unlink(missing_ok=True)
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        with (self.root / "dockerd.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["dockerd", "--config-file", str(self.root / "daemon.json")],
                env=os.environ | {"PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd does not start:\n{self.log[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it in order. Without live-restore that ends its containers as well."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and its containerd with SIGKILL. Containers live on."""
        pid_file = self.root / "exec/containerd/containerd.pid"
        containerd = int(pid_file.read_text()) if pid_file.exists() else 0
        self._end(signal.SIGKILL)
        if containerd:
            with contextlib.suppress(ProcessLookupError):
                os.kill(containerd, signal.SIGKILL)
            _await_end(containerd)

    def restart(self) -> None:
        self.stop()
        self.start()

    def client(self) -> docker.DockerClient:
        """A client; its user closes it."""
        return docker.DockerClient(base_url=self.url, timeout=60)

    def remove(self) -> None:
        """Ends its containers and itself, and leaves nothing on the host."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        with contextlib.closing(self.client()) as client:
            for found in client.containers.list(all=True):
                found.remove(force=True)
        self.stop()
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{self.root}/"):
                subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
        shutil.rmtree(self.root)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(self.socket))
            sock.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in sock.recv(100)
        return False

    def _end(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(_STOP_S)


@contextlib.contextmanager
def own_engine(*, live_restore: bool = False, runsc: bool = False, image: bool = True) -> Iterator[OwnEngine]:
    """An engine beside the host's own, without a bridge or firewall rules; `image` puts IMAGE into it."""
    # Short: the path of a unix socket has room for 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="e80e-", dir="/var/tmp"))
    root.chmod(0o711)
    settings: dict[str, object] = {
        "data-root": f"{root}/data",
        "exec-root": f"{root}/exec",
        "pidfile": f"{root}/docker.pid",
        "hosts": [f"unix://{root}/docker.sock"],
        "bridge": "none",
        "iptables": False,
        "ip6tables": False,
        "live-restore": live_restore,
    }
    if runsc:
        settings["runtimes"] = {"runsc": {"path": RUNSC, "runtimeArgs": RUNSC_ARGUMENTS}}
    engine = OwnEngine(root, settings)
    try:
        engine.start()
        if image:
            with contextlib.closing(engine.client()) as client:
                client.api.import_image_from_data(_packed(), repository=IMAGE.split(":")[0], tag="latest")
        yield engine
    finally:
        engine.remove()


@functools.cache
def _packed() -> bytes:
    """The archive of the small image, made once for each run of the tests."""
    done = subprocess.run(
        [*_PACK_COMMAND, _FULL_IMAGE, "-I", "-c", _PACK],
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"cannot pack an image: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout


def _await_end(pid: int) -> None:
    deadline = time.monotonic() + _STOP_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except OSError:
            return
        if state == b"Z":
            return
        time.sleep(0.02)
    raise RuntimeError(f"process {pid} does not end")
