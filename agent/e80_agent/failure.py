"""The exception that ended tenant code, as text and as data. Runs in the tenant's process: it is as untrusted
as the rest of what that says."""

from __future__ import annotations

import json
import os
import traceback
from types import TracebackType
from typing import Callable, Optional

# In characters; a character takes at most six bytes of JSON, and the agent keeps 256 KiB of it.
_MAX_TRACEBACK = 24 * 1024
_MAX_VALUE = 8 * 1024
_MAX_NAME = 200
_HERE = os.path.dirname(__file__) + os.sep


def theirs(error: BaseException, is_theirs: Callable[[str], bool]) -> Optional[TracebackType]:
    """Its traceback from the first frame on whose file is one of the tenant's, without what is of our own."""
    trace = error.__traceback__
    while trace is not None and not is_theirs(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    entries = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_HERE):
            entries.append(trace)
        trace = trace.tb_next
    for entry in reversed(entries):
        trace = TracebackType(trace, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return trace


def traceback_of(error: BaseException, is_theirs: Callable[[str], bool]) -> str:
    return "".join(traceback.format_exception(type(error), error, theirs(error, is_theirs)))


def pack(error: BaseException, text: str) -> bytes:
    """The record of an error, with `text` as its traceback."""
    try:
        value = str(error)
    except Exception:
        value = "<str() of the exception failed>"
    fact = {
        "name": type(error).__name__[:_MAX_NAME],
        "value": value[:_MAX_VALUE],
        "traceback": text[-_MAX_TRACEBACK:],
    }
    return json.dumps(fact, ensure_ascii=False).encode("utf-8", "replace")
