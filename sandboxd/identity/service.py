"""Rules of identity: who a key is, and how keys are made and revoked. Look-ups are cached in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from sandboxd.identity import audit, idempotency, store
from sandboxd.identity.errors import (
    IdempotencyReplayedError,
    KeyNotFoundError,
    NoSuchProjectError,
    ProjectNotFoundError,
)
from sandboxd.identity.models import ApiKey, AuditEntry, Organization, Project
from sandboxd.identity.secrets import digest, display_prefix, is_well_formed, new_key
from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import StoreUnavailableError, UnauthorizedError
from sandboxd.kit.ids import is_id, new_id
from sandboxd.kit.paging import PageParams

CACHE_SIZE = 10_000
# Bounds how long a change made to the file by hand goes unseen; revoking through the API acts at once.
CACHE_TTL_S = 30.0
# A store that cannot be asked: how long a key that was good stays so, and how often it is tried.
STALE_S = 600.0
ASK_AGAIN_S = 5.0
FLUSH_BATCH = 500
IDEMPOTENCY_SCOPE = "apikey"


@dataclass(frozen=True, slots=True)
class Quota:
    """What a project's living sandboxes may take together; None where only the server's own limits hold."""

    sandboxes: int | None = None
    cpu_mhz: int | None = None
    memory_size_mb: int | None = None

    @classmethod
    def of(cls, project: Project) -> Self:
        return cls(project.max_sandboxes, project.max_cpu_mhz, project.max_memory_size_mb)


@dataclass(frozen=True, slots=True)
class Principal:
    """On whose behalf a request runs."""

    key_id: str
    project_id: str
    project_slug: str
    organization_id: str
    quota: Quota = Quota()

    @classmethod
    def of(cls, key: ApiKey, project: Project) -> Self:
        return cls(
            key_id=key.id,
            project_id=project.id,
            project_slug=project.slug,
            organization_id=project.organization_id,
            quota=Quota.of(project),
        )


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """A new key's row, and the only copy of its secret."""

    row: ApiKey
    key: str


@dataclass(slots=True)
class _Cached:
    principal: Principal
    seen_at: float
    ask_at: float


class IdentityService:
    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._cache: dict[str, _Cached] = {}
        self._revocations = 0
        self._last_used: dict[str, float] = {}

    async def authenticate(self, key: str) -> Principal:
        """The key's Principal, or UnauthorizedError. No query for a cached key, nor for a malformed one."""
        secret = digest(key)
        cached = self._cache.get(secret)
        if cached is not None and cached.ask_at > self._clock.monotonic():
            principal = cached.principal
        else:
            principal = await self._ask(key, secret, cached)
        self._last_used[principal.key_id] = self._clock.now()
        return principal

    async def check_active(self, key_id: str) -> None:
        """Raises UnauthorizedError when the key has been revoked since its request began; for answers that
        do not end."""
        async with self._db.read() as session:
            active = await store.is_active(session, key_id)
        if not active:
            raise UnauthorizedError("The API key of this request has been revoked.")

    async def ensure_project(self, organization: str, project: str) -> Project:
        """The project of that name; it and its organization are made when missing."""
        async with self._db.write() as session:
            await self._db.serialize(session, "identity.projects")
            owner = await store.find_organization(session, organization)
            if owner is None:
                owner = Organization(id=new_id("org"), slug=organization, created_at=self._clock.now())
                session.add(owner)
                await session.flush()
            found = await store.find_project(session, owner.id, project)
            if found is None:
                found = Project(
                    id=new_id("proj"), organization_id=owner.id, slug=project, created_at=self._clock.now()
                )
                session.add(found)
        return found

    async def set_quota(
        self, organization: str, project: str, changes: Mapping[str, int | None], *, actor: str
    ) -> Quota:
        """Changes the named parts of a project's quota and leaves the others. Without changes it only tells
        the quota. Daemons that run follow within CACHE_TTL_S."""
        async with self._db.write() as session:
            await self._db.serialize(session, "identity.projects")
            owner = await store.find_organization(session, organization)
            found = owner and await store.find_project(session, owner.id, project)
            if not found:
                raise NoSuchProjectError(organization, project)
            for name, value in changes.items():
                setattr(found, f"max_{name}", value)
            if changes:
                session.add(found)
                audit.record(
                    session,
                    project_id=found.id,
                    actor=actor,
                    action="project.set_quota",
                    resource_id=found.id,
                    at=self._clock.now(),
                    **changes,
                )
            return Quota.of(found)

    async def create_key(
        self,
        project_id: str,
        name: str,
        *,
        actor: str,
        idempotency_key: str | None = None,
        request_digest: str = "",
    ) -> CreatedKey:
        """A new key. One that an earlier request with the same Idempotency-Key made is refused, not repeated:
        its secret is gone."""
        key, now = new_key(), self._clock.now()
        row = ApiKey(
            id=new_id("key"),
            project_id=project_id,
            name=name,
            prefix=display_prefix(key),
            secret_sha256=digest(key),
            created_at=now,
        )
        async with self._db.write() as session:
            if idempotency_key is not None:
                first = await idempotency.insert(
                    session,
                    project_id=project_id,
                    scope=IDEMPOTENCY_SCOPE,
                    key=idempotency_key,
                    digest=request_digest,
                    resource_id=row.id,
                    at=now,
                )
                if first is not None:
                    idempotency.check_same(first, request_digest)
                    raise IdempotencyReplayedError(idempotency_key, first.resource_id)
            session.add(row)
            audit.record(
                session,
                project_id=project_id,
                actor=actor,
                action="apikey.create",
                resource_id=row.id,
                at=now,
                name=name,
            )
        return CreatedKey(row=row, key=key)

    async def list_keys(self, project_id: str, params: PageParams) -> tuple[list[ApiKey], bool]:
        """One page of a project's keys, revoked ones too, and whether there are more."""
        async with self._db.read() as session:
            rows, has_more = await store.list_keys(session, project_id, params)
        return [self._fresh(row) for row in rows], has_more

    async def get_key(self, project_id: str, key_id: str) -> ApiKey:
        async with self._db.read() as session:
            row = await store.find_key(session, project_id, key_id) if is_id(key_id) else None
        if row is None:
            raise KeyNotFoundError(key_id)
        return self._fresh(row)

    async def revoke_key(self, project_id: str, key_id: str, *, actor: str) -> ApiKey:
        """Make a key useless at once. Idempotent: the first revocation's time stays."""
        if not is_id(key_id):
            raise KeyNotFoundError(key_id)
        now = self._clock.now()
        async with self._db.write() as session:
            if await store.revoke(session, project_id, key_id, now):
                audit.record(
                    session,
                    project_id=project_id,
                    actor=actor,
                    action="apikey.revoke",
                    resource_id=key_id,
                    at=now,
                )
            row = await store.find_key(session, project_id, key_id)
            if row is None:
                raise KeyNotFoundError(key_id)
        # Also on a repeat: it costs nothing, and repairs a first call that died right after its commit.
        self._revocations += 1
        self._cache.pop(row.secret_sha256, None)
        return self._fresh(row)

    async def list_audit(
        self,
        project_id: str,
        params: PageParams,
        *,
        action: str | None = None,
        resource_id: str | None = None,
    ) -> tuple[list[AuditEntry], bool]:
        """One page of what was done in a project, and whether there is more."""
        async with self._db.read() as session:
            return await store.list_audit(session, project_id, action, resource_id, params)

    async def flush_last_used(self) -> None:
        """Write down when keys were last used. A job calls this; requests only note the time in memory."""
        while self._last_used:
            batch = dict(list(self._last_used.items())[:FLUSH_BATCH])
            async with self._db.write() as session:
                await store.set_last_used(session, batch)
            for key_id, used_at in batch.items():
                if self._last_used.get(key_id) == used_at:
                    del self._last_used[key_id]

    async def _ask(self, key: str, secret: str, cached: _Cached | None) -> Principal:
        if cached is None:
            return await self._look_up(key, secret)
        # One request asks, the others go on with what is known.
        cached.ask_at = self._clock.monotonic() + ASK_AGAIN_S
        try:
            return await self._look_up(key, secret)
        except StoreUnavailableError:
            # A store that is away cannot have revoked the key; execs need nothing else of it.
            stale = self._cache.get(secret) is not cached
            if stale or self._clock.monotonic() > cached.seen_at + STALE_S:
                raise
            return cached.principal

    async def _look_up(self, key: str, secret: str) -> Principal:
        if not is_well_formed(key):
            raise UnauthorizedError(
                "This is not an API key of this server: keys look like 8080_live_... and end in a checksum,"
                " which does not match. Copy the whole key."
            )
        revocations = self._revocations
        async with self._db.read() as session:
            found = await store.find_active_key(session, secret)
        if found is None:
            self._cache.pop(secret, None)
            raise UnauthorizedError("This API key is unknown or revoked. Use another key, or create one.")
        row, project = found
        principal = Principal.of(row, project)
        # A revocation that ended while the query ran must not be undone by what the query saw before it.
        if revocations == self._revocations:
            if len(self._cache) >= CACHE_SIZE and secret not in self._cache:
                self._cache.pop(next(iter(self._cache)))
            now = self._clock.monotonic()
            self._cache[secret] = _Cached(principal, seen_at=now, ask_at=now + CACHE_TTL_S)
        return principal

    def _fresh(self, row: ApiKey) -> ApiKey:
        row.last_used_at = self._last_used.get(row.id, row.last_used_at)
        return row


def check_project(principal: Principal, project: str | None) -> None:
    """Refuse a body's `project` that is not the key's own (slug or id)."""
    if project is not None and project not in (principal.project_slug, principal.project_id):
        raise ProjectNotFoundError(project)
