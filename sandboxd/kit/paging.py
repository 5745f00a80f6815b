"""Lists: what a client asks for, and the envelope it gets. Rows are ordered by id, and ids by time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel
from sqlmodel.sql.expression import SelectOfScalar

DEFAULT_LIMIT = 20
MAX_LIMIT = 100


class Resource(BaseModel):
    """Base of what a list holds: a thing with an id."""

    id: str


T = TypeVar("T", bound=Resource)
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class PageParams:
    limit: int = DEFAULT_LIMIT
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


class Page(BaseModel, Generic[T]):
    """The list envelope of every route that lists."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, items: Sequence[T], *, has_more: bool) -> Self:
        return cls(
            data=list(items),
            first_id=items[0].id if items else None,
            last_id=items[-1].id if items else None,
            has_more=has_more,
        )


def paged(statement: SelectOfScalar[Row], id_column: Any, params: PageParams) -> SelectOfScalar[Row]:
    """Order, cut and limit a query. It fetches one row too many: pass the rows to `split` for the rest."""
    ascending = params.order == "asc"
    statement = statement.order_by(id_column.asc() if ascending else id_column.desc())
    if params.after is not None:
        statement = statement.where(id_column > params.after if ascending else id_column < params.after)
    return statement.limit(params.limit + 1)


def split(rows: Sequence[Row], params: PageParams) -> tuple[list[Row], bool]:
    """Rows of the page, and whether there are more."""
    return list(rows[: params.limit]), len(rows) > params.limit
