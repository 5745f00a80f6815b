"""Signed URLs: made for a key, good until they expire, the key is revoked, or what they name is gone."""

import secrets
from collections.abc import Mapping
from typing import Any

from sandboxd.identity import audit, store
from sandboxd.identity.models import Secret
from sandboxd.identity.service import Principal
from sandboxd.identity.signing import Pairs, SignedRequest, is_good, signed_query
from sandboxd.kit.clock import Clock
from sandboxd.kit.db import Database
from sandboxd.kit.errors import UnauthorizedError

_NAME = "url_signing"
_SECRET_BYTES = 32


class SignedUrls:
    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._secret = b""

    async def create(
        self,
        principal: Principal,
        method: str,
        path: str,
        pairs: Pairs,
        *,
        expires_in_s: int,
        action: str,
        resource_id: str,
        details: Mapping[str, Any],
    ) -> tuple[str, int]:
        """The query that makes a request to that path a signed one, and when it expires. The audit trail says
        who made it and for what, never its signature."""
        secret = await self._signing_secret()
        now = self._clock.now()
        expires_at = int(now) + expires_in_s
        async with self._db.write() as session:
            audit.record(
                session,
                project_id=principal.project_id,
                actor=principal.key_id,
                action=action,
                resource_id=resource_id,
                at=now,
                expires_at=expires_at,
                **details,
            )
        return signed_query(secret, method, path, pairs, expires_at, principal.key_id), expires_at

    async def authenticate(self, request: SignedRequest) -> Principal:
        """On whose behalf a signed request runs. Raises UnauthorizedError."""
        if not is_good(await self._signing_secret(), request):
            raise UnauthorizedError(
                "The signature of this URL is wrong: it was changed, or is for another method or server.",
                code="invalid_signature",
            )
        if self._clock.now() >= request.expires_at:
            raise UnauthorizedError("This signed URL has expired. Make another one.", code="url_expired")
        async with self._db.read() as session:
            found = await store.find_active_key_by_id(session, request.key_id)
        if found is None:
            raise UnauthorizedError(
                "The API key that made this signed URL has been revoked.", code="invalid_signature"
            )
        return Principal.of(*found)

    async def _signing_secret(self) -> bytes:
        """The secret of all daemons on the store; whoever needs it first makes it."""
        if self._secret:
            return self._secret
        async with self._db.read() as session:
            row = await store.find_secret(session, _NAME)
        if row is None:
            row = await self._make_secret()
        self._secret = bytes.fromhex(row.value)
        return self._secret

    async def _make_secret(self) -> Secret:
        async with self._db.write() as session:
            # Of two daemons that need it at once, the second gets what the first has made.
            await self._db.serialize(session, "identity.secret")
            row = await store.find_secret(session, _NAME)
            if row is None:
                value = secrets.token_hex(_SECRET_BYTES)
                row = Secret(name=_NAME, value=value, created_at=self._clock.now())
                session.add(row)
        return row
