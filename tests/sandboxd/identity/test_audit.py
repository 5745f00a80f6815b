from sandboxd.identity import audit, store
from sandboxd.kit.origin import Origin, current_origin
from sandboxd.kit.paging import PageParams


async def write_entry(db) -> None:
    async with db.write() as session:
        audit.record(
            session,
            project_id="proj_1",
            actor="key_1",
            action="thing.stop",
            resource_id="thing_1",
            at=5.0,
            reason="user",
        )


async def entries(db):
    async with db.read() as session:
        return (await store.list_audit(session, "proj_1", None, None, PageParams()))[0]


async def test_an_entry_says_which_request_it_was(db):
    token = current_origin.set(Origin("req_1", "192.0.2.7"))
    await write_entry(db)
    current_origin.reset(token)
    await write_entry(db)
    found = await entries(db)
    # Two entries of one millisecond have no order.
    assert {(entry.request_id, entry.client) for entry in found} == {("req_1", "192.0.2.7"), (None, None)}
    assert [entry.details for entry in found] == [{"reason": "user"}] * 2
