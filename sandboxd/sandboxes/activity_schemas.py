"""Bodies of the routes that tell what happened and what was used."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from sandboxd.kit.paging import Resource
from sandboxd.sandboxes.models import Event, UsageHour
from sandboxd.sandboxes.usage import HOUR_S


class EventOut(Resource):
    object: Literal["sandbox.event"] = "sandbox.event"
    type: str
    sandbox_id: str
    created_at: float
    data: dict[str, Any]

    @classmethod
    def of(cls, row: Event) -> Self:
        return cls(
            id=row.id,
            type=row.type,
            sandbox_id=row.sandbox_id,
            created_at=round(row.created_at, 3),
            data=row.data,
        )


class UsageOut(BaseModel):
    """What was used in one stretch of time."""

    sandbox_seconds: float = Field(0, description="Time that sandboxes were held, paused ones included.")
    cpu_seconds: float = 0
    bytes_in: int = Field(0, description="Code, input and files sent to sandboxes.")
    bytes_out: int = Field(0, description="Output and files that came from them.")
    execs: int = 0
    sandboxes: int = Field(0, description="Sandboxes created.")

    def add(self, row: UsageHour) -> None:
        self.sandbox_seconds = round(self.sandbox_seconds + row.sandbox_s, 3)
        self.cpu_seconds = round(self.cpu_seconds + row.cpu_s, 3)
        self.bytes_in += row.bytes_in
        self.bytes_out += row.bytes_out
        self.execs += row.execs
        self.sandboxes += row.sandboxes


class UsageBucketOut(UsageOut):
    start: int


class UsageReportOut(BaseModel):
    object: Literal["usage"] = "usage"
    start: int = Field(serialization_alias="from", description="Full hour, UTC, in Unix seconds.")
    end: int = Field(serialization_alias="to", description="Full hour, not included.")
    total: UsageOut
    data: list[UsageBucketOut] = Field(description="Only stretches in which something was used.")

    @classmethod
    def of(cls, rows: list[UsageHour], first_hour: int, last_hour: int, bucket_hours: int) -> Self:
        total = UsageOut()
        buckets: dict[int, UsageBucketOut] = {}
        for row in rows:
            total.add(row)
            start = row.hour // bucket_hours * bucket_hours * HOUR_S
            buckets.setdefault(start, UsageBucketOut(start=start)).add(row)
        return cls(
            start=first_hour * HOUR_S, end=last_hour * HOUR_S, total=total, data=list(buckets.values())
        )
