"""Structured logs on stderr, for our own code and for libraries that use the standard logging."""

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

SECRET_FIELDS = frozenset({"authorization", "api_key", "apikey", "token", "password", "secret", "key"})
SECRET_TEXT = re.compile(r"\b(8080_[a-z]+_[0-9A-Za-z]{4})[0-9A-Za-z_]+|((?i:bearer)\s+)[^\s'\",]+")
REDACTED = "[redacted]"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# These say on every request, statement or frame what our own lines say once.
QUIET_LIBRARIES = ("alembic", "aiosqlite", "asyncio", "docker", "httpx2", "sqlalchemy", "urllib3", "uvicorn")


def configure(log_format: Literal["json", "console"], level: str) -> None:
    """Set up logging for the whole process. May be called again."""
    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    # Exceptions become text before the redaction, or their messages would slip past it.
    end: list[Processor] = [structlog.processors.format_exc_info, redact, renderer]
    structlog.configure(
        processors=[*chain, *end],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*chain, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *end],
        )
    )
    logging.basicConfig(handlers=[handler], level=LEVELS[level], force=True)
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, LEVELS[level]))


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Take API keys and Authorization headers out of every field, nested ones too."""
    for name, value in event.items():
        event[name] = REDACTED if name.lower() in SECRET_FIELDS else _redact(value)
    return event


def _redact(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return SECRET_TEXT.sub(_mask, value)
    if isinstance(value, bytes):
        return SECRET_TEXT.sub(_mask, value.decode("utf-8", "replace"))
    if depth < 4 and isinstance(value, Mapping):
        return {
            name: REDACTED if str(name).lower() in SECRET_FIELDS else _redact(item, depth + 1)
            for name, item in value.items()
        }
    if depth < 4 and isinstance(value, list | tuple):
        return [_redact(item, depth + 1) for item in value]
    return value


def _mask(match: re.Match[str]) -> str:
    return f"{match[1] or match[2]}{REDACTED}"
