"""Python in a context: IPython's shell, whose results go to the agent as they would go to a notebook.

Needs IPython. Imported by the warm parent ahead of its use, and hidden from all its children but contexts.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import warnings
from types import FrameType
from typing import Any, Dict, List, Optional

# So that no child has to import them.
from IPython.core import application, completer, completerlib, crashhandler, logger, magics, oinspect  # noqa: F401
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import UsageError
from IPython.core.history import HistoryManager
from IPython.core.inputtransformer2 import leading_empty_lines
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type, default, observe

from e80_agent import channel, failure, protocol, serve

# What a display with an id, or the wish to clear the output, is told by, beside or in place of other types.
DISPLAY_TYPE = "application/vnd.e80.display+json"
CLEAR_TYPE = "application/vnd.e80.clear+json"
INTERRUPTED = 130
_MATPLOTLIB = "module://matplotlib_inline.backend_inline"
_SHELL_GRACE_S = 0.5


def _is_cell(filename: str) -> bool:
    return filename.startswith("<cell ")


class Compiler(CachingCompiler):
    def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
        return "<cell %d>" % number


class Hook(DisplayHook):
    """The value of the last expression."""

    def write_output_prompt(self) -> None:
        return

    def write_format_data(self, format_dict: Dict[str, Any], md_dict: Any = None) -> None:
        self.shell.tell(format_dict)

    def log_output(self, format_dict: Dict[str, Any]) -> None:
        return  # IPython would keep every picture for its history

    def finish_displayhook(self) -> None:
        self._is_active = False


class Publisher(DisplayPublisher):
    """What `display` shows."""

    def publish(
        self,
        data: Any,
        metadata: Any = None,
        source: Any = None,
        *,
        transient: Any = None,
        update: bool = False,
        **_: Any,
    ) -> None:
        data = dict(data)
        display_id = (transient or {}).get("display_id")
        if display_id is not None:
            data[DISPLAY_TYPE] = {"id": str(display_id)[:200], "update": bool(update)}
        self.shell.tell(data)

    def clear_output(self, wait: bool = False) -> None:
        self.shell.tell({CLEAR_TYPE: {"wait": bool(wait)}})


class Shell(InteractiveShell):
    compiler_class = Type(Compiler)
    displayhook_class = Type(Hook)
    display_pub_class = Type(Publisher)

    def attach(self, reporter: serve.Reporter) -> None:
        self._reporter = reporter
        self.exit_code = 0
        self.user_ns["exit"] = self.user_ns["quit"] = self.user_ns_hidden["exit"] = leave
        self.user_ns_hidden["quit"] = leave

    def tell(self, data: Dict[str, Any]) -> None:
        """Sends a bundle, behind what was printed before it."""
        serve.flush(sys.stdout, sys.stderr)
        bundle = _clean(data)
        if bundle:
            self._reporter.send(channel.RESULT, _pack(bundle))

    def fail(self, error: BaseException) -> None:
        """What ends a call early: on stderr, and as data. Leaving is no error."""
        if isinstance(error, SystemExit):
            self.exit_code = _exit_code(error)
            return
        self.exit_code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, UsageError):
            text = "UsageError: %s\n" % error
        else:
            text = failure.traceback_of(error, _is_cell)
        serve.flush(sys.stdout)
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except Exception:
            os.write(2, text.encode("utf-8", "backslashreplace"))
        self._reporter.send(channel.ERROR, failure.pack(error, text))

    def showtraceback(self, exc_tuple: Any = None, *_: Any, **__: Any) -> None:
        error = self._get_exc_info(exc_tuple)[1]
        if error is not None:
            self.fail(error)

    def _format_exception_for_storage(self, exception: BaseException, *_: Any, **__: Any) -> Dict[str, Any]:
        # For its history. Its own traceback would cost more than the call it is of.
        return {"ename": type(exception).__name__, "evalue": "", "traceback": []}

    def showsyntaxerror(self, *_: Any, **__: Any) -> None:
        self.showtraceback()

    def init_ipython_dir(self, ipython_dir: Any) -> None:
        self.ipython_dir = os.environ.get("IPYTHONDIR") or os.path.expanduser("~/.ipython")

    def enable_gui(self, gui: Any = None) -> None:
        return  # `%matplotlib inline` asks for none

    def system(self, cmd: str) -> None:
        """`!cmd`, in a session of its own, so that an interrupt ends all of it and nothing else."""
        process = subprocess.Popen(
            ["/bin/bash", "-c", self.var_expand(cmd, depth=1)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.user_ns["_exit_code"] = process.wait()
        except KeyboardInterrupt:
            _stop(process)
            raise KeyboardInterrupt from None

    # IPython would make its folders in the tenant's home, for features that hardly anybody asks for.
    @default("profile_dir")
    def _profile(self) -> Any:
        from IPython.core.profiledir import ProfileDir

        os.makedirs(self.ipython_dir, exist_ok=True)
        return ProfileDir.create_profile_dir_by_name(self.ipython_dir, "default")

    @observe("ipython_dir")
    def _ipython_dir_changed(self, change: Any) -> None:
        return

    def init_history(self) -> None:
        self.history_manager = History(shell=self, parent=self)
        self.configurables.append(self.history_manager)

    def init_profile_dir(self, profile_dir: Any) -> None:
        return


class History(HistoryManager):
    """Of this session alone, and in memory."""

    enabled = False

    def _get_hist_file_name(self, profile: Any = None) -> str:
        return ":memory:"


class Notebook:
    """One shell, in the main thread of its process."""

    def __init__(self, reporter: serve.Reporter) -> None:
        self.ended: Optional[int] = None
        self._shell = Shell.instance(colors="nocolor")
        self._shell.attach(reporter)
        transforms = self._shell.input_transformer_manager.cleanup_transforms
        transforms[:] = [item for item in transforms if item is not leading_empty_lines]
        transforms.insert(0, _leading_empty_lines)
        warnings.filterwarnings("ignore", "To exit: use", UserWarning)
        if "matplotlib" in sys.modules:
            # The usual way would look for backends among all that is installed: half of a context's start.
            dict.__setitem__(sys.modules["matplotlib"].rcParams, "backend", _MATPLOTLIB)
        else:
            os.environ.setdefault("MPLBACKEND", _MATPLOTLIB)
        self._null = os.open("/dev/null", os.O_WRONLY)
        signal.signal(signal.SIGINT, _ignore)

    def run(self, code: str, out: int, err: int) -> int:
        serve.redirect(out, err)
        shell = self._shell
        shell.exit_code = 0
        try:
            # What the tenant sets instead holds to the end of the call.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            shell.run_cell(code, store_history=True)
            signal.signal(signal.SIGINT, _ignore)
        except KeyboardInterrupt as error:
            signal.signal(signal.SIGINT, _ignore)
            shell.fail(error)  # it came in between what catches it
        serve.redirect(os.dup(self._null), os.dup(self._null))
        return int(shell.exit_code)


def _leading_empty_lines(lines: List[str]) -> List[str]:
    """Leaves them away before `%%magic` only: elsewhere the lines of tracebacks would be others."""
    first = next((index for index, line in enumerate(lines) if line.strip()), 0)
    return lines[first:] if lines and lines[first].startswith("%%") else lines


def _ignore(_number: int, _frame: Optional[FrameType]) -> None:
    """Of an interrupt between two calls. Not SIG_IGN, which the programs that it starts would inherit."""


def leave(code: Any = None) -> None:
    """`exit` and `quit`: the end of this call; the context stays."""
    raise SystemExit(code)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_SHELL_GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _clean(data: Dict[str, Any]) -> Dict[str, Any]:
    """The bundle without what JSON cannot hold: bytes as base64, numbers that are none as null."""
    bundle: Dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode()
        try:
            text = json.dumps(value)
            text.encode()
            if not isinstance(value, str):
                value = json.loads(text, parse_constant=lambda _: None)
            else:
                value = value.encode("utf-8", "replace").decode()
        except (TypeError, ValueError, RecursionError):
            continue  # an object that no client could be sent
        bundle[str(name)] = value
    return bundle


def _pack(bundle: Dict[str, Any]) -> bytes:
    data = json.dumps(bundle).encode()
    if len(data) <= protocol.MAX_RESULT:
        return data
    kinds = ", ".join(sorted(bundle))[:1000]
    text = "<a result of %d bytes (%s) left out: the limit is %d>" % (len(data), kinds, protocol.MAX_RESULT)
    return json.dumps({"text/plain": text}).encode()
