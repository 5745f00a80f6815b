"""The operations a daemon can ask for, one file each."""

from __future__ import annotations

import importlib
from typing import Any, Callable, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection
from e80_agent.ops import attach, command, contexts, hello, python, resize, signals, stdin, timers, wait, warm

Operation = Callable[[Agent, Connection, Dict[str, Any], bytes], None]


def _at_first_use(module: str, name: str) -> Operation:
    """An operation of a module that a sandbox need not wait for at its start: tar and the like take a third
    as long to import as all else. The agent's own folder is first in the path, and read-only."""

    def operation(agent: Agent, connection: Connection, header: Dict[str, Any], body: bytes) -> None:
        found: Operation = getattr(importlib.import_module("e80_agent.ops." + module), name)
        found(agent, connection, header, body)

    return operation


OPERATIONS: Dict[str, Operation] = {
    "hello": hello.hello,
    "python": python.run_python,
    "command": command.run_command,
    "attach": attach.attach,
    "wait": wait.wait,
    "signal": signals.send_signal,
    "stdin": stdin.write_stdin,
    "resize": resize.resize,
    "warm": warm.warm,
    "timers": timers.timers,
    "context_create": contexts.create,
    "context_list": contexts.list_all,
    "context_restart": contexts.restart,
    "context_interrupt": contexts.interrupt,
    "context_delete": contexts.delete,
    "context_exec": contexts.run_in_context,
    "read_file": _at_first_use("files", "read_file"),
    "write_file": _at_first_use("files", "write_file"),
    "stat_file": _at_first_use("folders", "stat_file"),
    "list_folder": _at_first_use("folders", "list_folder"),
    "make_folder": _at_first_use("folders", "make_folder"),
    "move": _at_first_use("folders", "move"),
    "remove": _at_first_use("folders", "remove"),
    "chmod": _at_first_use("folders", "chmod"),
    "pack": _at_first_use("archives", "pack"),
    "unpack": _at_first_use("archives", "unpack"),
    "watch": _at_first_use("watch", "watch"),
}


def serve(agent: Agent, connection: Connection, header: Dict[str, Any], body: bytes) -> None:
    """Does what one request asks for, or answers why not."""
    operation = OPERATIONS.get(str(header.get("op")))
    if operation is None:
        connection.fail("unknown_operation", "this agent knows %s" % ", ".join(sorted(OPERATIONS)))
        return
    try:
        operation(agent, connection, header, body)
    except (KeyError, TypeError, ValueError) as error:
        connection.fail("bad_request", "%s: %r" % (header.get("op"), error))
    except OSError as error:
        # Out of processes or descriptors: this request fails, the agent goes on.
        connection.fail("start_failed", "%s: %s" % (header.get("op"), error.strerror))
