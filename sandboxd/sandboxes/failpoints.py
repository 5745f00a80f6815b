"""The steps between which a crash must lose nothing. Tests kill the daemon at each of them."""

import os
import signal
from enum import StrEnum

import structlog

log = structlog.get_logger(__name__)


class FailPoint(StrEnum):
    CREATE_INSERTED = "create.inserted"
    CREATE_MADE = "create.made"
    CREATE_ANSWERED = "create.answered"
    CREATE_RUNNING = "create.running"
    CLAIM_CLAIMED = "claim.claimed"
    UPDATE_APPLIED = "update.applied"
    PAUSE_MARKED = "pause.marked"
    PAUSE_FROZEN = "pause.frozen"
    RESUME_THAWED = "resume.thawed"
    RESUME_RUNNING = "resume.running"
    STOP_MARKED = "stop.marked"
    STOP_DELETED = "stop.deleted"
    STOP_ENDED = "stop.ended"


class FailPoints:
    """Does nothing unless one is armed; then the process dies there, as suddenly as a crash would have it."""

    def __init__(self, armed: str = "") -> None:
        self._armed = armed

    def reach(self, point: FailPoint) -> None:
        if point == self._armed:
            log.warning("fail point reached", point=point)
            os.kill(os.getpid(), signal.SIGKILL)
