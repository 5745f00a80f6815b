"""What is sent again and what is not, and which error comes out."""

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from e80_sdk import (
    AsyncEighty80,
    AuthenticationError,
    BadRequestError,
    ConnectionFailedError,
    ConnectionLostError,
    DiskFullError,
    E80Error,
    IdempotencyConflictError,
    NotLoggedInError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    UnavailableError,
    UnexpectedResponseError,
)
from e80_sdk.api import SandboxApi
from e80_sdk.config import Connection
from e80_sdk.retries import Patience
from e80_sdk.transport import Request, Transport

from tests.e80_sdk.fake_server import FakeServer, Fault

BUSY = {"error": {"message": "busy", "type": "server_error", "code": "unavailable", "param": None}}


class Waits:
    """Stands in for sleeping, and remembers for how long."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)

    def clock(self) -> float:
        return time.monotonic() + sum(self.seconds)


class RawServer:
    """Gives each connection the same bytes and closes it; None: never answers."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer = answer
        self._handlers: list[asyncio.Task[None] | None] = []
        self.requests = 0

    async def start(self, port: int = 0) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        await asyncio.wait([task for task in self._handlers if task is not None])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._handlers.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        if self._answer is None:
            await reader.read()
        else:
            writer.write(self._answer)
        writer.close()
        await writer.wait_closed()


@pytest.fixture
def waits() -> Waits:
    return Waits()


def make_api(base_url: str, waits: Waits, **options: Any) -> SandboxApi:
    connection = Connection(base_url, options.pop("api_key", FakeServer.api_key), "argument", "argument")
    patience = Patience(
        options.pop("patience_s", 60), options.pop("unknown_s", None), options.pop("max_retries", None)
    )
    return SandboxApi(Transport(connection, patience=patience, sleep=waits, clock=waits.clock, **options))


async def test_503_with_retry_after_is_sent_again_with_the_same_key(fake: FakeServer, waits: Waits) -> None:
    fake.faults.append(Fault("POST", "/sandboxes", 503, {"Retry-After": "2"}, BUSY, times=2))
    info = await make_api(fake.base_url, waits).create({})
    assert info.status == "running"
    assert waits.seconds == [2.0, 2.0]
    keys = {one.headers["idempotency-key"] for one in fake.seen}
    assert len(keys) == 1
    assert len(fake.sandboxes) == 1


async def test_create_and_exec_carry_keys_of_their_own(fake: FakeServer, waits: Waits) -> None:
    api = make_api(fake.base_url, waits)
    info = await api.create({})
    await api.execs.run(info.id, {"command": "true"})
    await api.execs.run(info.id, {"command": "true"})
    await api.stop(info.id)
    keys = [one.headers.get("idempotency-key") for one in fake.seen]
    assert len(set(keys[:3])) == 3
    assert keys[3] is None


async def test_a_429_without_retry_after_is_not_sent_again(fake: FakeServer, waits: Waits) -> None:
    fake.faults.append(Fault("POST", "/sandboxes", 429, {}, BUSY))
    with pytest.raises(RateLimitError):
        await make_api(fake.base_url, waits).create({})
    assert waits.seconds == []


async def test_a_long_retry_after_is_told_and_not_waited_for(fake: FakeServer, waits: Waits) -> None:
    fake.faults.append(Fault("POST", "/sandboxes", 429, {"Retry-After": "3600"}, BUSY))
    with pytest.raises(RateLimitError) as caught:
        await make_api(fake.base_url, waits).create({})
    assert caught.value.retry_after_s == 3600
    assert waits.seconds == []


async def test_waiting_ends(fake: FakeServer, waits: Waits) -> None:
    fake.faults.append(Fault("POST", "/sandboxes", 429, {"Retry-After": "9"}, BUSY, times=99))
    with pytest.raises(RateLimitError):
        await make_api(fake.base_url, waits).create({})
    assert waits.seconds == [9, 9, 9]


async def test_retries_end(fake: FakeServer, waits: Waits) -> None:
    fake.faults.append(Fault("GET", "/sandboxes", 503, {"Retry-After": "1"}, BUSY, times=99))
    with pytest.raises(UnavailableError, match="busy"):
        await make_api(fake.base_url, waits, max_retries=3).list()
    assert len(fake.seen) == 4


async def test_a_get_is_sent_again_after_a_gateway_error(fake: FakeServer, waits: Waits) -> None:
    fake.faults.append(Fault("GET", "/sandboxes", 502))
    assert await make_api(fake.base_url, waits).list() == []
    assert len(waits.seconds) == 1


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_create_is_sent_again_after_a_gateway_error(
    fake: FakeServer, waits: Waits, status: int
) -> None:
    fake.faults.append(Fault("POST", "/sandboxes", status, times=2))
    await make_api(fake.base_url, waits).create({})
    assert len(fake.seen) == 3
    assert len({one.headers["idempotency-key"] for one in fake.seen}) == 1


async def test_a_post_that_the_server_would_not_know_again_is_not_sent_again(
    fake: FakeServer, waits: Waits
) -> None:
    transport = make_api(fake.base_url, waits).transport
    fake.faults.append(Fault("POST", "/apikeys", 502))
    with pytest.raises(UnexpectedResponseError, match="502"):
        await transport.send(Request("POST", "/v1/apikeys", body={"name": "x"}))
    fake.faults.append(Fault("POST", "/apikeys", 0))
    with pytest.raises(ConnectionLostError, match="not sent again because that could do it twice"):
        await transport.send(Request("POST", "/v1/apikeys", body={"name": "x"}))
    assert len(fake.seen) == 2
    fake.faults.append(Fault("POST", "/apikeys", 0))
    await transport.send(Request("POST", "/v1/apikeys", body={"name": "x"}, idempotency_key="mine"))
    assert [one.headers.get("idempotency-key") for one in fake.seen[2:]] == ["mine", "mine"]


@pytest.mark.parametrize("after", [False, True])
async def test_an_answer_that_gets_lost_makes_no_second_sandbox_or_run(
    fake: FakeServer, waits: Waits, after: bool
) -> None:
    api = make_api(fake.base_url, waits)
    for end in ("/sandboxes", "/exec", "/stop"):
        fake.faults.append(Fault("POST", end, 0, after=after, times=2))
    info = await api.create({})
    assert list(fake.sandboxes) == [info.id]
    result = await api.execs.run(info.id, {"command": "echo once >> log; cat log"})
    assert result == "once\n"
    assert (await api.stop(info.id)).status == "stopped"


async def test_interrupted_work_is_taken_up_again(fake: FakeServer, waits: Waits) -> None:
    api = make_api(fake.base_url, waits)
    info = await api.create({})
    stopped = {"error": {**BUSY["error"], "code": "interrupted"}}
    fake.faults.append(Fault("POST", "/exec", 503, {}, stopped, times=3))
    assert await api.execs.run(info.id, {"command": "echo hi"}) == "hi\n"


async def test_a_sandbox_that_a_restart_lost_before_it_ran_is_made_anew(
    fake: FakeServer, waits: Waits
) -> None:
    fake.stillborn = 2
    info = await make_api(fake.base_url, waits).create({})
    assert fake.alive() == [info.id]
    assert len(fake.sandboxes) == 3
    fake.stillborn = 9
    with pytest.raises(ServerError, match=r"ended before it ran \(lost\)"):
        await make_api(fake.base_url, waits).create({})


async def test_one_key_for_two_things_is_an_error(fake: FakeServer, waits: Waits) -> None:
    api = make_api(fake.base_url, waits)
    info = await api.create({"idempotency_key": "mine"})
    assert (await api.create({"idempotency_key": "mine"})).id == info.id
    with pytest.raises(IdempotencyConflictError, match="mine"):
        await api.create({"idempotency_key": "mine", "image": "other"})
    assert (await api.execs.run(info.id, {"command": "echo 1"}, key="k")) == "1\n"
    with pytest.raises(IdempotencyConflictError):
        await api.execs.run(info.id, {"command": "echo 2"}, key="k")
    assert fake.last("POST", "/sandboxes").body == {"image": "other"}


async def test_patience_ends_and_says_so(waits: Waits) -> None:
    api = make_api(f"http://127.0.0.1:{_closed_port()}", waits)
    with pytest.raises(ConnectionFailedError, match=r"gave up after \d+ attempts in (5\d|60) s") as caught:
        await api.create({})
    assert "is it running" in caught.value.message
    assert 57 < sum(waits.seconds) <= 60
    assert max(waits.seconds) <= 2
    assert waits.seconds[0] <= 0.1


async def test_a_server_that_never_answered_gets_less(fake: FakeServer, waits: Waits) -> None:
    heard: list[float] = []
    address = f"http://127.0.0.1:{_closed_port()}"
    api = make_api(address, waits, unknown_s=5, on_wait=lambda error, left_s: heard.append(left_s))
    with pytest.raises(ConnectionFailedError):
        await api.list()
    assert 3 < sum(waits.seconds) <= 5
    assert heard == sorted(heard, reverse=True)
    assert len(heard) == len(waits.seconds)


async def test_what_is_no_http_is_not_asked_again(waits: Waits) -> None:
    server = RawServer(b"220 mail.example.org ESMTP\r\n\r\n")
    api = make_api(await server.start(), waits)
    with pytest.raises(ConnectionLostError):
        await api.list()
    assert waits.seconds == []
    await server.close()


async def test_a_refused_connection_is_tried_again_until_the_server_is_back() -> None:
    port = _closed_port()
    answer = b'{"id": "sbx_1", "status": "running"}'
    server = RawServer(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

    async def wait(seconds: float) -> None:
        await server.start(port)

    connection = Connection(f"http://127.0.0.1:{port}", "k", "argument", "argument")
    info = await SandboxApi(Transport(connection, sleep=wait)).create({})
    assert info.id == "sbx_1"
    assert server.requests == 1
    await server.close()


async def test_a_server_that_is_down_is_named(waits: Waits) -> None:
    with pytest.raises(ConnectionFailedError, match="is it running"):
        await make_api(f"http://127.0.0.1:{_closed_port()}", waits, max_retries=2).create({})
    assert len(waits.seconds) == 2


async def test_a_server_that_always_drops_is_given_up(waits: Waits) -> None:
    server = RawServer(b"")
    api = make_api(await server.start(), waits, max_retries=2)
    with pytest.raises(ConnectionLostError, match=r"whether it took effect is unknown \(gave up after 3"):
        await api.create({})
    assert server.requests == 3
    await server.close()


async def test_no_answer_in_time(waits: Waits) -> None:
    server = RawServer(None)
    api = make_api(await server.start(), waits)
    with pytest.raises(RequestTimeoutError, match=r"within 0\.1 s"):
        await api.transport.send(Request("GET", "/v1/sandboxes", idempotent=True, timeout_s=0.1))
    assert waits.seconds == [], "the time is used up"
    await server.close()


async def test_errors_carry_what_the_server_said(fake: FakeServer, waits: Waits) -> None:
    api = make_api(fake.base_url, waits)
    with pytest.raises(BadRequestError) as caught:
        await api.create({"image": "missing"})
    error = caught.value
    assert (error.status, error.code, error.param, error.request_id) == (
        400,
        "invalid_request",
        "image",
        "req_fake",
    )
    assert "missing" in str(error)
    assert isinstance(error, E80Error)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (500, "internal_error", ServerError),
        (507, "disk_full", DiskFullError),
        (418, "teapot", E80Error),
        (401, "unauthorized", AuthenticationError),
    ],
)
async def test_every_status_has_a_class(
    fake: FakeServer, waits: Waits, status: int, code: str, kind: type[E80Error]
) -> None:
    body = {"error": {"message": "m", "type": "t", "code": code, "param": None}}
    fake.faults.append(Fault("POST", "/sandboxes", status, {}, body))
    with pytest.raises(kind) as caught:
        await make_api(fake.base_url, waits).create({})
    assert type(caught.value) is kind
    assert caught.value.code == code


async def test_something_else_at_that_address(fake: FakeServer, waits: Waits) -> None:
    fake.faults.append(Fault("GET", "/sandboxes", 200))
    with pytest.raises(UnexpectedResponseError, match="not this API"):
        await make_api(fake.base_url, waits).list()


async def test_without_a_key_nothing_is_sent(fake: FakeServer, waits: Waits) -> None:
    with pytest.raises(NotLoggedInError, match="8080 apikey set"):
        await make_api(fake.base_url, waits, api_key=None).list()
    assert fake.seen == []


async def test_half_a_file_is_an_error(fake: FakeServer, waits: Waits) -> None:
    api = make_api(fake.base_url, waits)
    info = await api.create({})
    await api.files.write(info.id, "f", b"x" * 1000)
    fake.cut_file = True
    with pytest.raises(ConnectionLostError):
        await api.files.read(info.id, "f")


async def test_a_source_is_read_again_for_a_retry(fake: FakeServer, waits: Waits, tmp_path: Path) -> None:
    fake.faults.append(Fault("PUT", "/files", 503, {"Retry-After": "0"}, BUSY))
    fake.faults.append(Fault("PUT", "/files", 0))
    api = make_api(fake.base_url, waits)
    info = await api.create({})
    local = tmp_path / "local"
    local.write_bytes(b"headbody")
    with local.open("rb") as file:
        file.read(4)
        assert await api.files.write(info.id, "f", file) == 4
    assert await api.files.read(info.id, "f") == b"body"
    assert fake.count("PUT", "/files") == 3


async def test_a_source_that_cannot_be_read_again_says_so(fake: FakeServer, waits: Waits) -> None:
    api = make_api(fake.base_url, waits)
    info = await api.create({})
    fake.faults.append(Fault("PUT", "/files", 0))
    with pytest.raises(ConnectionLostError, match="not sent again: this iterator cannot be read"):
        await api.files.write(info.id, "f", iter([b"one"]))


async def test_connections_are_shared_inside_a_hold_and_closed_after_it(login: FakeServer) -> None:
    client = AsyncEighty80()
    async with client:
        await client.sandboxes.list()
        pool = next(iter(client.api.transport._pools.values()))
        await client.sandboxes.list()
        assert next(iter(client.api.transport._pools.values())) is pool
    assert len(client.api.transport._pools) == 0
    assert pool.client.is_closed


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
