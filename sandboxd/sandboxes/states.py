"""The states of a sandbox and of an exec, and why a sandbox is no longer alive."""

from enum import StrEnum


class Status(StrEnum):
    CREATING = "creating"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


ALIVE = (Status.CREATING, Status.RUNNING, Status.STOPPING)


class Reason(StrEnum):
    """Why a sandbox ended; each row that is not alive has one."""

    USER = "user"
    TIMEOUT = "timeout"
    OOM = "oom"
    RUNTIME_ERROR = "runtime_error"
    LOST = "lost"


class ExecStatus(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    KILLED = "killed"
    OOM = "oom"
    LOST = "lost"
