"""A Jupyter kernel to be measured against: ipykernel in a process of this host, asked by jupyter_client."""

import subprocess
import time
from types import TracebackType
from typing import Self

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from scripts.benchlib.figures import BenchError

ANSWER_S = 60.0


class Kernel:
    """Lives as long as the `with` block. It keeps variables from one run to the next, as a context does."""

    def __init__(self) -> None:
        self._manager = KernelManager(kernel_name="python3")
        self._client: BlockingKernelClient | None = None

    def __enter__(self) -> Self:
        self._manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._client = self._manager.client()
            self._client.start_channels()
            self._client.wait_for_ready(timeout=ANSWER_S)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def run(self, code: str, expected: str) -> float:
        """Milliseconds from the request until the kernel says that it is idle again."""
        assert self._client is not None
        start = time.perf_counter()
        asked = self._client.execute(code, allow_stdin=False)
        said = ""
        while True:
            message = self._client.get_iopub_msg(timeout=ANSWER_S)
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["msg_type"] == "stream":
                said += message["content"]["text"]
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        elapsed = time.perf_counter() - start
        if said != expected:
            raise BenchError(f"the Jupyter kernel answered {said!r} instead of {expected!r}")
        return elapsed * 1000

    def _close(self) -> None:
        if self._client is not None:
            self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()


def first_result(code: str, expected: str) -> float:
    """Milliseconds from the start of a new kernel until it has run the code."""
    start = time.perf_counter()
    with Kernel() as kernel:
        kernel.run(code, expected)
        elapsed = time.perf_counter() - start
    return elapsed * 1000
