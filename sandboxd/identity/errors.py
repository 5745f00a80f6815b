"""Errors of identity."""

from sandboxd.kit.errors import NotFoundError


class KeyNotFoundError(NotFoundError):
    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no API key {key_id[:64]!r} in this project. List them: GET /v1/apikeys.")


class ProjectNotFoundError(NotFoundError):
    def __init__(self, project: str) -> None:
        super().__init__(
            f"This API key has no project {project[:64]!r}. Leave 'project' out to use the key's own.",
            param="project",
        )
