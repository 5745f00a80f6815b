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


class IdempotencyReplayedError(ConflictError):
    code = "idempotency_replayed"

    def __init__(self, key: str, resource_id: str) -> None:
        super().__init__(
            f"Idempotency-Key {key[:64]!r} has made the API key {resource_id} before, and its secret is shown"
            " only once. If that answer is lost, revoke it and make another one with a new Idempotency-Key.",
            param="Idempotency-Key",
        )


class NoSuchProjectError(NotFoundError):
    """For the operator, who may know which organizations and projects there are."""

    def __init__(self, organization: str, project: str) -> None:
        super().__init__(
            f"There is no project {project!r} in organization {organization!r}. "
            f"Make it: sandboxd create-key --organization {organization} --project {project} --name NAME"
        )
