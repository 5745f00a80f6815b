"""Text from a path or a query that PostgreSQL cannot even be asked for: it takes no NUL characters."""

import pytest
from pydantic import ValidationError

from sandboxd.kit.paging import PageParams
from sandboxd.sandboxes import store
from sandboxd.sandboxes.schemas import CreateSandboxBody


@pytest.mark.parametrize("sandbox_id", ["\0", "sbx_\0", "sbx_" + "0" * 33 + "\0", "x" * 100_000, "\ud800"])
async def test_what_cannot_be_an_id_is_not_found(db, sandbox_id):
    async with db.read() as session:
        assert await store.find(session, "proj_1", sandbox_id) is None


@pytest.mark.parametrize("value", ["\0", "a\0b", "'", "%", "\\", '"', "\u2028", "x" * 100_000])
async def test_any_value_of_a_label_can_be_asked_for(db, value):
    async with db.read() as session:
        rows, more = await store.list_page(session, "proj_1", None, {"a": value}, PageParams())
    assert (rows, more) == ([], False)


def test_a_label_holds_nothing_that_cannot_be_asked_for():
    with pytest.raises(ValidationError, match="NUL"):
        CreateSandboxBody(labels={"a": "b\0"})
