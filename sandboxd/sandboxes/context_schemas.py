"""Bodies of the context routes."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field

from sandboxd.agentlink.contexts import Context
from sandboxd.kit.http import Body
from sandboxd.kit.paging import Resource
from sandboxd.sandboxes.contexts import HOME
from sandboxd.sandboxes.schemas import Argument, Env


class CreateContextBody(Body):
    language: Annotated[Argument, Field(min_length=1, max_length=32)] = Field(
        "python", description="`python` or `bash`."
    )
    cwd: Argument = Field(HOME, min_length=1, max_length=4096)
    env: Env = Field(default_factory=dict, description="Variables, beside those of the sandbox.")


class ContextOut(Resource):
    """An interpreter or a shell that keeps its state from call to call."""

    object: Literal["sandbox.context"] = "sandbox.context"
    sandbox_id: str
    language: str
    cwd: str = Field(description="The folder it began in.")
    status: Literal["idle", "busy", "lost"]
    executions: int = Field(description="Calls that have begun since it was started.")
    created_at: float
    last_used_at: float

    @classmethod
    def of(cls, sandbox_id: str, context: Context) -> Self:
        return cls(
            id=context.id,
            sandbox_id=sandbox_id,
            language=context.language,
            cwd=context.cwd,
            status=context.status,
            executions=context.executions,
            created_at=round(context.created_at, 3),
            last_used_at=round(context.last_used_at, 3),
        )


class DeletedContextOut(BaseModel):
    id: str
    object: Literal["sandbox.context"] = "sandbox.context"
    deleted: Literal[True] = True
