"""What can go wrong below the contract, as facts a caller can act on."""

from sandboxd.kit.errors import BadRequestError, ConflictError, SandboxdError, UnavailableError


class EngineUnavailableError(UnavailableError):
    """The engine did not answer in time, or not at all. Nothing is known about the sandbox."""

    code = "engine_unavailable"


class RuntimeFaultError(SandboxdError):
    """The engine refused or failed for a reason that is not the caller's."""

    code = "runtime_error"


class ImageNotFoundError(BadRequestError):
    code = "image_not_found"


class ImageUnusableError(BadRequestError):
    """The image exists, but an agent cannot run in it."""

    code = "image_unusable"


class SpecRefusedError(BadRequestError):
    """The driver cannot honour the spec, and a spec is refused, never weakened."""

    code = "spec_refused"


class AgentUnreachableError(UnavailableError):
    """No connection to the sandbox's agent within the deadline."""

    code = "agent_unreachable"


class FreezeFailedError(UnavailableError):
    """The kernel could not freeze the sandbox's processes, which goes on as it was: something in it forks
    without end."""

    code = "freeze_failed"


class LimitBelowUseError(ConflictError):
    """A memory limit below what the sandbox uses now."""

    code = "limit_below_use"
