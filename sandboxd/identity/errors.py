"""Errors of identity."""

from sandboxd.kit.errors import ConflictError, NotFoundError


class KeyNotFoundError(NotFoundError):
    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no API key {key_id[:64]!r} in this project. List them: GET /v1/apikeys.")


class ProjectNotFoundError(NotFoundError):
    def __init__(self, project: str) -> None:
        super().__init__(
            f"This API key has no project {project[:64]!r}. Leave 'project' out to use the key's own.",
            param="project",
        )


class IdempotencyConflictError(ConflictError):
    code = "idempotency_conflict"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Idempotency-Key {key[:64]!r} was sent before with another body. Send the same body to get what"
            " it made, or a new key to make something new.",
            param="Idempotency-Key",
        )
