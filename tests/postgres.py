"""A real PostgreSQL for tests: a server of its own, as an unprivileged user; databases from a template."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from sandboxd.kit.db import Database

BINARIES = Path("/usr/lib/postgresql")
# Needs every kind of care in a URL.
PASSWORD, PASSWORD_IN_URL = "p@ss/w:rd", "p%40ss%2Fw%3Ard"
START_S = 30


class PostgresServer:
    """By unix socket everybody is let in; by TCP a password is asked for."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        # Short: the path of a unix socket has room for 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="e80-pg-", dir="/tmp"))
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        self._own_root()
        password = self.root / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._initialize(password)

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.root),
            "port": str(self.port),
            # Safe when the server is killed; only a crash of the host would lose something.
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
            "max_connections": "200",
        }
        arguments = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user(), str(self._binaries / "postgres"), "-D", str(self.data), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
            )
        deadline = time.monotonic() + START_S
        while self._try_sql("SELECT 1").returncode != 0:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def kill(self) -> None:
        """As a crash does; its children notice and end by themselves."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        # Fast shutdown: does not wait for clients.
        self._end(signal.SIGINT)
        shutil.rmtree(self.root)

    def new_database(self) -> str:
        """URL of an empty database."""
        name = self._new_name()
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def migrated_database(self) -> str:
        """URL of a database with all tables, copied from one that was migrated once."""
        if "template" not in self.sql("SELECT datname FROM pg_database").split():
            self.sql("CREATE DATABASE template")
            asyncio.run(_migrate(self.url("template")))
        name = self._new_name()
        self.sql(f"CREATE DATABASE {name} TEMPLATE template STRATEGY FILE_COPY")
        return self.url(name)

    def drop(self, url: str) -> None:
        name = url.partition("?")[0].rpartition("/")[2]
        self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://e80@/{database}?host={self.root}&port={self.port}"

    def tcp_url(self, url: str) -> str:
        """The same database over loopback with a password, as a user would write it."""
        database = url.partition("?")[0].rpartition("/")[2]
        return f"postgresql://e80:{PASSWORD_IN_URL}@127.0.0.1:{self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        done = self._try_sql(statement, database)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    def _new_name(self) -> str:
        self._made += 1
        return f"test_{self._made}"

    def _initialize(self, password: Path) -> None:
        done = subprocess.run(
            [
                *self._as_user(),
                str(self._binaries / "initdb"),
                *("-D", str(self.data), "-U", "e80", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"),
                *("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.root,
        )
        assert done.returncode == 0, done.stderr

    def _try_sql(self, statement: str, database: str = "postgres") -> subprocess.CompletedProcess[str]:
        target = ["-h", str(self.root), "-p", str(self.port), "-U", "e80", "-d", database]
        return subprocess.run(
            [str(self._binaries / "psql"), "-XAtq", *target, "-c", statement],
            capture_output=True,
            text=True,
            timeout=60,
        )

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(START_S)

    def _own_root(self) -> None:
        if os.geteuid() == 0:
            user = _user()
            os.chown(self.root, user.pw_uid, user.pw_gid)
        self.root.chmod(0o755)

    def _as_user(self) -> list[str]:
        """PostgreSQL refuses to run as root, and must end with this process even if that is killed."""
        words = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            user = _user()
            words += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        return words


def find_binaries() -> Path | None:
    """The folder with the newest server's programs, if one is installed."""
    found = [path.parent for path in BINARIES.glob("*/bin/initdb")]
    return max(found, key=lambda path: float(path.parent.name), default=None)


async def _migrate(url: str) -> None:
    database = Database(url)
    await database.migrate()
    await database.close()


def _user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
