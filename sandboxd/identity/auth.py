"""Authentication at the door: every path under /v1 needs a key, or the signature of one, before its body is
read."""

from typing import Annotated

from fastapi import Depends
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from sandboxd.identity import signing
from sandboxd.identity.service import IdentityService, Principal
from sandboxd.identity.signing import SignedRequest
from sandboxd.identity.urls import SignedUrls
from sandboxd.kit.errors import SandboxdError, UnauthorizedError
from sandboxd.kit.http import API_PREFIX, error_response


class AuthMiddleware:
    """Puts the Principal into the scope, or answers 401, or 503 when the store cannot be asked. A new route
    cannot forget it."""

    def __init__(self, app: ASGIApp, *, identity: IdentityService, urls: SignedUrls) -> None:
        self.app = app
        self.identity = identity
        self.urls = urls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(API_PREFIX):
            try:
                signed = _signed(scope)
                if signed is not None:
                    scope["principal"] = await self.urls.authenticate(signed)
                else:
                    scope["principal"] = await self.identity.authenticate(_bearer(scope))
            except SandboxdError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _PrincipalOfRequest(SecurityBase):
    """The dependency behind CurrentPrincipal; a SecurityBase, so that OpenAPI names the scheme."""

    model = HTTPBearerModel(description="An API key: `Authorization: Bearer 8080_live_...`")
    scheme_name = "ApiKey"

    async def __call__(self, connection: HTTPConnection) -> Principal:
        principal = connection.scope.get("principal")
        if not isinstance(principal, Principal):
            raise _missing()
        return principal


CurrentPrincipal = Annotated[Principal, Depends(_PrincipalOfRequest())]


def _signed(scope: Scope) -> SignedRequest | None:
    """The request that a signature in the query stands for; a key, where one is sent, goes before it."""
    if b"signature=" not in scope["query_string"]:
        return None
    if any(name == b"authorization" for name, _ in scope["headers"]):
        return None
    request = signing.read(scope["method"], scope["path"], scope["query_string"])
    if request is None:
        raise UnauthorizedError(
            "The signature of this URL is wrong: a part of it is missing, or there twice.",
            code="invalid_signature",
        )
    return request


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and key.strip():
                return str(key.strip())
            raise _missing()
    raise _missing()


def _missing() -> UnauthorizedError:
    return UnauthorizedError(
        "No API key was sent. Send the header 'Authorization: Bearer <key>'.", code="missing_api_key"
    )
