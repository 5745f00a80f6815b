"""The operations a daemon can ask for, one file each."""

from __future__ import annotations

from e80_agent.ops import attach, command, files, hello, python, signals, warm

OPERATIONS = {
    "hello": hello.hello,
    "python": python.run_python,
    "command": command.run_command,
    "attach": attach.attach,
    "signal": signals.send_signal,
    "warm": warm.warm,
    "read_file": files.read_file,
    "write_file": files.write_file,
}
