"""Arguments, settings, signals and drain: the process around the application."""

import argparse
import asyncio
import ctypes
import fcntl
import gc
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog
import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import ValidationError

from sandboxd.app import VERSION, Services, create_app, stop_all
from sandboxd.identity.schemas import CreateKeyBody
from sandboxd.identity.service import IdentityService
from sandboxd.kit import logging
from sandboxd.kit.clock import SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import SandboxdError
from sandboxd.kit.settings import Settings, unknown_variables, variable_name
from sandboxd.kit.sse import Protocol

EXIT_FAILED = 1
EXIT_USAGE = 64
# Bounds how long cancelled requests and open connections may take to end.
CLOSE_TIMEOUT_S = 2
# New objects before the garbage collector looks at the young ones; Python's own 700 is for small programs.
GC_THRESHOLD = 10_000
# From malloc.h.
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# What fits into the store's column.
QUOTA_MAX = 2**31 - 1
QUOTA_OPTIONS = {
    "sandboxes": "sandboxes alive at once",
    "cpu_mhz": "CPU of its living sandboxes together",
    "memory_size_mb": "memory of its living sandboxes together",
}

log = structlog.get_logger(__name__)


class AlreadyRunningError(Exception):
    """Another daemon holds the state folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        settings = Settings()
    except ValidationError as error:
        for fault in error.errors():
            if fault["type"] == "default_factory_not_called":
                continue  # follows from another fault
            name = variable_name(str(fault["loc"][0])) if fault["loc"] else "settings"
            sys.stderr.write(f"sandboxd: {name}: {fault['msg'].removeprefix('Value error, ')}\n")
        return EXIT_USAGE
    logging.configure(settings.log_format, settings.log_level)
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        sys.stderr.write(f"sandboxd: {variable_name('state_dir')}: {error}\n")
        return EXIT_FAILED
    if options.command == "create-key":
        return asyncio.run(_create_key(settings, options.organization, options.project, options.name))
    if options.command == "stop-all":
        return _stop_all(settings)
    if options.command == "set-quota":
        return asyncio.run(_set_quota(settings, options))
    return _serve(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sandboxd",
        description="Control plane of isolated sandboxes. Settings come from the environment: SANDBOXD_*.",
    )
    parser.add_argument("--version", action="version", version=f"sandboxd {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="run the daemon in the foreground (the default)")
    create_key = commands.add_parser("create-key", help="make an API key and print it, alone, on stdout")
    create_key.add_argument(
        "--organization", type=_slug, default="default", help="made when missing (default: default)"
    )
    create_key.add_argument(
        "--project", type=_slug, default="default", help="made when missing (default: default)"
    )
    create_key.add_argument("--name", type=_name, required=True, help="what the key is for")
    commands.add_parser("stop-all", help="end every sandbox of this installation while no daemon runs")
    set_quota = commands.add_parser("set-quota", help="change and print what a project may take")
    set_quota.add_argument("--organization", type=_slug, default="default", help="(default: default)")
    set_quota.add_argument("--project", type=_slug, required=True)
    for name, what in QUOTA_OPTIONS.items():
        set_quota.add_argument(
            f"--{name.replace('_', '-')}",
            type=_quota,
            default=argparse.SUPPRESS,
            metavar="N|none",
            help=f"{what}; none: as the server's settings say",
        )
    return parser


def _slug(text: str) -> str:
    if SLUG.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name: 1 to 63 letters, digits, '.', '_', '-', the first a letter or digit"
        )
    return text


def _name(text: str) -> str:
    try:
        return CreateKeyBody(name=text).name
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}") from None


def _quota(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= QUOTA_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'none' nor a whole number from 1 to {QUOTA_MAX}"
        )
    return int(text)


async def _create_key(settings: Settings, organization: str, project: str, name: str) -> int:
    db = Database(settings.database_url)
    try:
        await db.migrate()
        identity = IdentityService(db, SystemClock())
        owner = await identity.ensure_project(organization, project)
        created = await identity.create_key(owner.id, name, actor="sandboxd create-key")
    except SandboxdError as error:
        sys.stderr.write(f"sandboxd: {error.message}\n")
        return EXIT_FAILED
    finally:
        await db.close()
    sys.stdout.write(f"{created.key}\n")
    return 0


def _stop_all(settings: Settings) -> int:
    try:
        with _only_one(settings.state_dir):
            count = asyncio.run(stop_all(settings))
    except (AlreadyRunningError, SandboxdError) as error:
        sys.stderr.write(f"sandboxd: {error}\n")
        return EXIT_FAILED
    sys.stdout.write(f"stopped {count} sandboxes\n")
    return 0


async def _set_quota(settings: Settings, options: argparse.Namespace) -> int:
    changes = {name: getattr(options, name) for name in QUOTA_OPTIONS if hasattr(options, name)}
    db = Database(settings.database_url)
    try:
        await db.migrate()
        identity = IdentityService(db, SystemClock())
        quota = await identity.set_quota(
            options.organization, options.project, changes, actor="sandboxd set-quota"
        )
    except SandboxdError as error:
        sys.stderr.write(f"sandboxd: {error.message}\n")
        return EXIT_FAILED
    finally:
        await db.close()
    for name in QUOTA_OPTIONS:
        own = getattr(quota, name)
        sys.stdout.write(f"{name}: {_server_quota(settings, name) if own is None else own}\n")
    return 0


def _server_quota(settings: Settings, name: str) -> str:
    field = f"quota_{name}"
    value = getattr(settings, field)
    return f"{value} ({variable_name(field)})" if value else "none"


def _serve(settings: Settings) -> int:
    for name in unknown_variables():
        log.warning("unknown setting is ignored", variable=name)
    _raise_file_limit()
    _tame_malloc()
    try:
        with _only_one(settings.state_dir), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(settings))
    except AlreadyRunningError as error:
        log.error("cannot start", reason=str(error))
        return EXIT_FAILED


async def _run(settings: Settings) -> int:
    app = create_app(settings)
    stop = asyncio.Event()
    try:
        # The application does it, too; here its failure is a line of its own, and no traceback.
        await app.state.services.db.migrate()
    except SandboxdError as error:
        log.error("cannot start", reason=error.message)
        return EXIT_FAILED

    def on_signal() -> None:
        if stop.is_set():
            # Asked twice: whoever sends it does not want to wait for the drain.
            app.state.services.drain.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return await serve(app, stop)


async def serve(app: FastAPI, stop: asyncio.Event) -> int:
    """Serve until `stop` is set, then drain. Returns the exit code."""
    services: Services = app.state.services
    server = _Server(
        uvicorn.Config(
            app,
            host=services.settings.host,
            port=services.settings.port,
            http=Protocol,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            # By default it believes whoever comes from loopback, which every user of the host does.
            proxy_headers=bool(services.settings.trusted_proxies),
            forwarded_allow_ips=services.settings.trusted_proxies,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            # What one request binds to its logs must not reach the next one of its connection.
            reset_contextvars=True,
        )
    )
    _spare_the_collector()
    drain = asyncio.get_running_loop().create_task(_drain_on(stop, services, server), name="drain")
    try:
        await server.serve()
    except SystemExit:
        # The address is taken or the application could not start; the reason is logged.
        return EXIT_FAILED
    finally:
        drain.cancel()
    log.info("stopped")
    return 0


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        # Signals start a drain instead; see _run.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        addresses = [listener.getsockname()[:2] for server in self.servers for listener in server.sockets]
        log.info("listening", addresses=addresses, version=VERSION, pid=os.getpid())


async def _drain_on(stop: asyncio.Event, services: Services, server: uvicorn.Server) -> None:
    """Once stopped: refuse new work, let running requests end, then close. Sandboxes are kept."""
    await stop.wait()
    services.drain.start()
    timeout_s = services.settings.drain_timeout_s
    log.info("draining", in_flight=services.drain.in_flight, timeout_s=timeout_s)
    if not await services.drain.wait_idle(timeout_s):
        log.warning("drain is over, cancelling requests", in_flight=services.drain.in_flight)
        services.drain.cancel()
        await services.drain.wait_idle(CLOSE_TIMEOUT_S)
    server.should_exit = True


@contextmanager
def _only_one(state_dir: Path) -> Iterator[None]:
    """Hold the state folder's lock, and tell others our pid."""
    with (state_dir / "sandboxd.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(f"another sandboxd runs on {state_dir}: stop it first") from None
        pid_file = state_dir / "sandboxd.pid"
        pid_file.write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            pid_file.unlink(missing_ok=True)


def _tame_malloc() -> None:
    # glibc's own way for threads and for big blocks that come and go leaves more and more memory in pieces:
    # the daemon then grows by hundreds of kilobytes for each hundred sandboxes, and never stops.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 2)
        libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def _spare_the_collector() -> None:
    # What is loaded by now lives as long as the process. Looking through it again and again would stop the
    # event loop for tens of milliseconds each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def _raise_file_limit() -> None:
    # A sandbox takes several descriptors, and the usual soft limit of 1024 is for programs that use select().
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
