"""The operations a daemon can ask for, one file each."""

from __future__ import annotations

from typing import Any, Dict

from e80_agent.agent import Agent
from e80_agent.link import Connection
from e80_agent.ops import (
    archives,
    attach,
    command,
    contexts,
    files,
    folders,
    hello,
    python,
    resize,
    signals,
    stdin,
    timers,
    wait,
    warm,
    watch,
)

OPERATIONS = {
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
    "read_file": files.read_file,
    "write_file": files.write_file,
    "stat_file": folders.stat_file,
    "list_folder": folders.list_folder,
    "make_folder": folders.make_folder,
    "move": folders.move,
    "remove": folders.remove,
    "chmod": folders.chmod,
    "pack": archives.pack,
    "unpack": archives.unpack,
    "watch": watch.watch,
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
