"""The states of a sandbox and of an exec, and why a sandbox is no longer alive."""

from enum import StrEnum


class Status(StrEnum):
    CREATING = "creating"
    # In the pool: started, and nobody's. No client ever sees one.
    READY = "ready"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


ALIVE = (Status.CREATING, Status.READY, Status.RUNNING, Status.PAUSED, Status.STOPPING)


class Reason(StrEnum):
    """Why a sandbox ended; each row that is not alive has one."""

    USER = "user"
    TIMEOUT = "timeout"
    IDLE_TIMEOUT = "idle_timeout"
    OOM = "oom"
    RUNTIME_ERROR = "runtime_error"
    # The engine, or the whole host, was restarted and did not keep its containers.
    RUNTIME_RESTART = "runtime_restart"
    # A member of the pool that nobody needs any more.
    SURPLUS = "surplus"
    LOST = "lost"


# Ends that nobody asked for.
FAILURES = (Reason.OOM, Reason.RUNTIME_ERROR, Reason.RUNTIME_RESTART, Reason.LOST)


class ExecStatus(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    KILLED = "killed"
    OOM = "oom"
    LOST = "lost"
    RUNNING = "running"
