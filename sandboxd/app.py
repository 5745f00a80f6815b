"""Builds the application: the only place that knows every slice."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Literal

import structlog
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sandboxd.identity.auth import AuthMiddleware, CurrentPrincipal
from sandboxd.identity.routes import make_router as make_identity_router
from sandboxd.identity.service import IdentityService
from sandboxd.identity.urls import SignedUrls
from sandboxd.kit.clock import Clock, SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import ForbiddenError, SandboxdError
from sandboxd.kit.http import ERROR_RESPONSES, Drain, install
from sandboxd.kit.installation import installation_id
from sandboxd.kit.metrics import CONTENT_TYPE, Metrics
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner
from sandboxd.runtimes.base import Capabilities, Runtime
from sandboxd.runtimes.registry import create_runtime
from sandboxd.sandboxes import admission, events, nodes, usage
from sandboxd.sandboxes.activity_routes import make_router as make_activity_router
from sandboxd.sandboxes.admission import Admission
from sandboxd.sandboxes.context_routes import make_router as make_contexts_router
from sandboxd.sandboxes.contexts import ContextService
from sandboxd.sandboxes.events import Events
from sandboxd.sandboxes.exec import ExecService
from sandboxd.sandboxes.exec_routes import make_exec_router
from sandboxd.sandboxes.file_routes import make_router as make_files_router
from sandboxd.sandboxes.file_urls import make_router as make_file_urls_router
from sandboxd.sandboxes.files import FileService
from sandboxd.sandboxes.forward import ForwardMiddleware
from sandboxd.sandboxes.history import History
from sandboxd.sandboxes.jobs import (
    FLUSH_INTERVAL_S,
    GAUGE_INTERVAL_S,
    REAP_INTERVAL_S,
    RETENTION_INTERVAL_S,
    SWEEP_RETRY_S,
    ExitWatcher,
    Gauges,
    Reaper,
    Retention,
    Sweep,
    Warmer,
)
from sandboxd.sandboxes.lifecycle import Lifecycle
from sandboxd.sandboxes.limits import Limits
from sandboxd.sandboxes.nodes import Nodes
from sandboxd.sandboxes.pool import Pool
from sandboxd.sandboxes.routes import make_router as make_sandboxes_router
from sandboxd.sandboxes.service import SandboxService

VERSION = version("e80")
LAST_USED_INTERVAL_S = 60.0
READY_TIMEOUT_S = 3.0
START_RETRY_S = 2.0
SETTLE_TIMEOUT_S = 10.0

log = structlog.get_logger(__name__)


class CheckOut(BaseModel):
    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    message: str
    fix: str


class IsolationOut(BaseModel):
    level: int
    runtime: str


class HealthOut(BaseModel):
    status: Literal["ok"] = "ok"
    version: str


class ReadyOut(BaseModel):
    status: Literal["ok"] = "ok"


class NotReadyOut(BaseModel):
    status: Literal["unavailable"] = "unavailable"
    reasons: dict[str, str]


class DoctorOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckOut]
    isolation: IsolationOut


@dataclass
class Services:
    """What the parts of one daemon share. Opened and closed by the application's lifespan."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    drain: Drain
    tasks: TaskOwner
    db: Database
    identity: IdentityService
    urls: SignedUrls
    runtime: Runtime
    lifecycle: Lifecycle
    admission: Admission
    pool: Pool
    events: Events
    nodes: Nodes
    sandboxes: SandboxService
    execs: ExecService
    files: FileService
    # Name -> check that raises when the part cannot serve; /readyz runs them all.
    readiness: dict[str, Callable[[], Awaitable[object]]] = field(default_factory=dict)


def create_app(settings: Settings) -> FastAPI:
    services = _make_services(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with _running(services):
            yield

    app = FastAPI(
        title="sandboxd",
        version=VERSION,
        summary="Isolated sandboxes for AI agents.",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        responses=ERROR_RESPONSES,
        generate_unique_id_function=lambda route: route.name,
        middleware=[
            Middleware(AuthMiddleware, identity=services.identity, urls=services.urls),
            Middleware(ForwardMiddleware, nodes=services.nodes, live=services.lifecycle.live),
        ],
    )
    app.state.services = services
    install(
        app,
        metrics=services.metrics,
        drain=services.drain,
        max_body_bytes=settings.max_body_mb * 1024 * 1024,
    )
    # First, because routes are tried in this order, and an exec is what clients feel.
    app.include_router(make_exec_router(services.sandboxes, services.execs, services.identity))
    app.include_router(make_contexts_router(services.sandboxes, ContextService(services.clock)))
    app.include_router(_make_operations_router(services))
    app.include_router(make_identity_router(services.identity))
    app.include_router(make_sandboxes_router(services.sandboxes))
    app.include_router(make_files_router(services.files, services.identity))
    app.include_router(make_file_urls_router(services.sandboxes, services.urls, settings.public_url))
    app.include_router(
        make_activity_router(services.sandboxes, services.events, services.lifecycle.meter, services.identity)
    )
    return app


def _make_services(settings: Settings) -> Services:
    clock = SystemClock()
    db = Database(settings.database_url)
    metrics = Metrics()
    tasks = TaskOwner()
    drain = Drain()
    runtime = create_runtime(settings)
    sandbox_events = Events(db, clock, closing=lambda: drain.active)
    lifecycle = Lifecycle(
        settings=settings,
        clock=clock,
        db=db,
        metrics=metrics,
        tasks=tasks,
        runtime=runtime,
        events=sandbox_events,
        node_id=installation_id(settings.state_dir),
    )
    limits = Limits(settings)
    room = Admission(settings, metrics, starting=lambda: lifecycle.creating)
    pool = Pool(
        settings=settings,
        clock=clock,
        metrics=metrics,
        lifecycle=lifecycle,
        limits=limits,
        images=runtime,
        admission=room,
    )
    sandboxes = SandboxService(
        clock=clock,
        db=db,
        runtime=runtime,
        images=runtime,
        lifecycle=lifecycle,
        limits=limits,
        pool=pool,
        admission=room,
        events=sandbox_events,
    )
    services = Services(
        settings=settings,
        clock=clock,
        metrics=metrics,
        drain=drain,
        tasks=tasks,
        db=db,
        identity=IdentityService(db, clock),
        urls=SignedUrls(db, clock),
        runtime=runtime,
        lifecycle=lifecycle,
        admission=room,
        pool=pool,
        events=sandbox_events,
        nodes=Nodes(db, clock, sandbox_events, lifecycle.node_id, settings.node_url),
        sandboxes=sandboxes,
        files=FileService(sandboxes, closing=lambda: drain.active),
        execs=ExecService(
            settings=settings,
            clock=clock,
            metrics=metrics,
            tasks=tasks,
            live=sandboxes.live,
            runtime=runtime,
            history=History(db, metrics),
            draining=lambda: drain.active,
        ),
    )
    lifecycle.on_adopted.append(services.execs.take_up)
    services.readiness["database"] = db.ping
    services.readiness["engine"] = runtime.ping
    return services


@asynccontextmanager
async def _running(services: Services) -> AsyncIterator[None]:
    try:
        await services.db.migrate()
        for first in (services.lifecycle.take_over, services.nodes.beat):
            await _try_write(first)
        _start_jobs(services)
        if not await _start_sandboxes(services):
            services.tasks.start("sandboxes.start", _keep_starting(services))
        yield
    finally:
        await services.lifecycle.settle(SETTLE_TIMEOUT_S)
        await services.tasks.close()
        for last in (
            services.execs.close,
            services.identity.flush_last_used,
            services.lifecycle.flush_activity,
            services.lifecycle.meter.tick,
        ):
            await _try_write(last)
        await services.runtime.close()
        await services.db.close()


async def _try_write(work: Callable[[], Awaitable[object]]) -> None:
    """One of the first or last writes: a store that cannot be written keeps the daemon neither from serving
    what it can nor from closing what it holds."""
    try:
        await work()
    except SandboxdError as error:
        log.warning("not written", reason=error.message)


async def stop_all(settings: Settings) -> int:
    """Ends every sandbox of this installation while no daemon runs on it; how many there were, those that
    waited in the pool not counted. Raises SandboxdError."""
    services = _make_services(settings)
    sweep = Sweep(services.lifecycle, services.db, services.runtime, services.metrics, services.pool)
    try:
        await services.db.migrate()
        await services.lifecycle.take_over()
        await services.runtime.start()
        await sweep.run()
        return await sweep.end_all()
    finally:
        await services.tasks.close()
        await services.runtime.close()
        await services.db.close()


def _start_jobs(services: Services) -> None:
    """What needs the store only."""
    tasks, lifecycle = services.tasks, services.lifecycle
    tasks.every(LAST_USED_INTERVAL_S, "identity.last_used", services.identity.flush_last_used)
    tasks.every(FLUSH_INTERVAL_S, "sandboxes.activity", lifecycle.flush_activity)
    tasks.every(events.POLL_INTERVAL_S, "sandboxes.events", services.events.poll)
    tasks.every(usage.METER_INTERVAL_S, "sandboxes.usage", lifecycle.meter.tick)
    tasks.every(
        GAUGE_INTERVAL_S, "sandboxes.gauges", Gauges(services.db, services.metrics, lifecycle.node_id).tick
    )
    tasks.every(events.POLL_INTERVAL_S, "execs.followers", services.execs.tick)
    tasks.start("execs.history", services.execs.history.batch.run())
    retention = Retention(services.db, services.clock, services.settings.history_days)
    tasks.every(RETENTION_INTERVAL_S, "sandboxes.retention", retention.tick)
    tasks.every(nodes.BEAT_INTERVAL_S, "nodes.beat", services.nodes.beat)
    tasks.every(nodes.LOST_INTERVAL_S, "nodes.lost", services.nodes.give_up_lost)
    tasks.every(admission.INOTIFY_INTERVAL_S, "sandboxes.inotify", services.admission.count_inotify)


async def _start_sandboxes(services: Services) -> bool:
    """Opens the runtime, takes up what an earlier process left, starts the jobs. False without an engine:
    the daemon serves what it can, and /readyz says what is missing."""
    tasks, lifecycle, metrics = services.tasks, services.lifecycle, services.metrics
    sweep = Sweep(lifecycle, services.db, services.runtime, metrics, services.pool)
    try:
        await services.runtime.start()
        lifecycle.capabilities = await services.runtime.capabilities()
        _log_checks(lifecycle.capabilities)
        await sweep.run()
    except SandboxdError as error:
        log.warning("sandboxes cannot be served yet", reason=error.message)
        return False
    tasks.every(REAP_INTERVAL_S, "sandboxes.reap", Reaper(lifecycle, services.clock, metrics).tick)
    tasks.every(SWEEP_RETRY_S, "sandboxes.sweep", sweep.tick)
    tasks.start("sandboxes.watch", ExitWatcher(lifecycle, services.runtime, sweep, tasks).run())
    if services.settings.warm_libraries:
        warmer = Warmer(lifecycle)
        lifecycle.on_live.append(warmer.add)
        tasks.start("sandboxes.warm", warmer.run())
    if services.pool.enabled:
        tasks.start("sandboxes.pool", services.pool.run())
    return True


async def _keep_starting(services: Services) -> None:
    while True:
        await asyncio.sleep(START_RETRY_S)
        if await _start_sandboxes(services):
            return


def _log_checks(capabilities: Capabilities) -> None:
    log.info("isolation", isolation_level=capabilities.isolation_level, runtime=capabilities.runtime)
    for check in capabilities.checks:
        if check.status != "ok":
            log.warning(f"check {check.name}", value=check.value, message=check.message, fix=check.fix)


def _make_operations_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def health() -> HealthOut:
        """Whether the process answers at all."""
        return HealthOut(version=VERSION)

    @router.get("/readyz", responses={200: {"model": ReadyOut}, 503: {"model": NotReadyOut}})
    async def ready() -> Response:
        """Whether it can serve sandboxes, and what keeps it from that."""
        reasons = await _reasons_not_ready(services)
        if reasons:
            return JSONResponse(NotReadyOut(reasons=reasons).model_dump(), 503)
        return JSONResponse(ReadyOut().model_dump())

    @router.get("/v1/doctor")
    async def doctor(_principal: CurrentPrincipal) -> DoctorOut:
        """The self-check: what this host and its engine can promise, and a fix for what they cannot."""
        found = await services.runtime.capabilities()
        return DoctorOut(
            data=[CheckOut(**asdict(check)) for check in found.checks],
            isolation=IsolationOut(level=found.isolation_level, runtime=found.runtime),
        )

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        if not services.settings.metrics_public and not _is_loopback(request):
            raise ForbiddenError(
                "Metrics are for loopback peers only. Set SANDBOXD_METRICS_PUBLIC=true to open them."
            )
        return Response(services.metrics.render(), media_type=CONTENT_TYPE)

    return router


async def _reasons_not_ready(services: Services) -> dict[str, str]:
    reasons = {"drain": "the server is shutting down"} if services.drain.active else {}
    for name, check in services.readiness.items():
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await check()
        except Exception as error:  # noqa: BLE001  # the reason itself is the answer
            reasons[name] = f"{type(error).__name__}: {error}"[:300]
    return reasons


def _is_loopback(request: Request) -> bool:
    # A proxy on this host is a loopback peer that speaks for others.
    if "x-forwarded-for" in request.headers or "forwarded" in request.headers:
        return False
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
