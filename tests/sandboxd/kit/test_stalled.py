"""Clients that stand still are cut off; those that are merely slow are not."""

import asyncio

import pytest

from sandboxd.kit.stalled import ABORT, receiving, sending

STALLED_S = 0.2


class Client:
    """One that sends its body in pieces, each after a while; cut off, it has left."""

    def __init__(self, pauses: list[float]) -> None:
        self.pauses = pauses
        self.left = asyncio.Event()
        self.scope = {"type": "http", "extensions": {ABORT: self.left.set}}

    async def receive(self):
        if not self.pauses:
            await self.left.wait()
            return {"type": "http.disconnect"}
        pause = self.pauses.pop(0)
        try:
            await asyncio.wait_for(self.left.wait(), pause)
        except TimeoutError:
            return {"type": "http.request", "body": b"x", "more_body": bool(self.pauses)}
        return {"type": "http.disconnect"}

    async def send(self, _message):
        await asyncio.sleep(self.pauses.pop(0))


async def test_a_client_that_stops_in_the_middle_of_its_body_has_left():
    client = Client([0.01, 60])
    receive = receiving(client.scope, client.receive, STALLED_S)
    assert (await receive())["body"] == b"x"
    assert (await receive())["type"] == "http.disconnect"


async def test_a_slow_client_may_take_its_time():
    client = Client([0.12, 0.12, 0.12])
    receive = receiving(client.scope, client.receive, STALLED_S)
    for _ in range(3):
        assert (await receive())["type"] == "http.request"
    assert not client.left.is_set()


async def test_who_has_sent_all_may_wait_for_the_answer():
    client = Client([0.01])
    receive = receiving(client.scope, client.receive, STALLED_S)
    await receive()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(receive(), 2 * STALLED_S)
    assert not client.left.is_set()


async def test_a_client_that_takes_nothing_is_cut_off():
    client = Client([0.12, 0.12, 3 * STALLED_S])
    send = sending(client.scope, client.send, STALLED_S)
    for cut in (False, False, True):
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert client.left.is_set() is cut


async def test_without_a_way_to_cut_off_nothing_changes():
    client = Client([])
    assert receiving({"type": "http"}, client.receive) == client.receive
    assert sending({"type": "http"}, client.send) == client.send
