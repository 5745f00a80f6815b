"""Builds the application: the only place that knows every slice."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sandboxd.identity.auth import AuthMiddleware
from sandboxd.identity.routes import make_router as make_identity_router
from sandboxd.identity.service import IdentityService
from sandboxd.kit.clock import Clock, SystemClock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import ForbiddenError
from sandboxd.kit.http import ERROR_RESPONSES, Drain, install
from sandboxd.kit.metrics import CONTENT_TYPE, Metrics
from sandboxd.kit.settings import Settings
from sandboxd.kit.tasks import TaskOwner

VERSION = version("e80")
LAST_USED_INTERVAL_S = 60.0
READY_TIMEOUT_S = 3.0


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
        middleware=[Middleware(AuthMiddleware, identity=services.identity)],
    )
    app.state.services = services
    install(
        app,
        metrics=services.metrics,
        drain=services.drain,
        max_body_bytes=settings.max_body_mb * 1024 * 1024,
    )
    app.include_router(_make_operations_router(services))
    app.include_router(make_identity_router(services.identity))
    return app


def _make_services(settings: Settings) -> Services:
    clock = SystemClock()
    db = Database(settings.database_url)
    services = Services(
        settings=settings,
        clock=clock,
        metrics=Metrics(),
        drain=Drain(),
        tasks=TaskOwner(),
        db=db,
        identity=IdentityService(db, clock),
    )
    services.readiness["database"] = db.ping
    return services


@asynccontextmanager
async def _running(services: Services) -> AsyncIterator[None]:
    try:
        await services.db.migrate()
        services.tasks.every(LAST_USED_INTERVAL_S, "identity.last_used", services.identity.flush_last_used)
        yield
    finally:
        await services.tasks.close()
        await services.identity.flush_last_used()
        await services.db.close()


def _make_operations_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": VERSION}

    @router.get("/readyz")
    async def ready() -> Response:
        reasons = await _reasons_not_ready(services)
        if reasons:
            return JSONResponse({"status": "unavailable", "reasons": reasons}, 503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
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
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
