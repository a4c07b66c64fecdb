"""Kernels of the notebooks of a run; the next one starts, and imports the library, while a notebook runs.

Starting Python and importing torch and its friends takes longer than many notebooks of a small run take themselves.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop, run_sync
from traitlets.config import Config

from nmlib import runtime

ARGUMENTS = (
    "--log-level=CRITICAL",  # a kernel is interrupted before it is shut down, and would report that as an error
    "--HistoryManager.hist_file=:memory:",  # what notebooks run is not what somebody typed
)


class Kernel(AsyncKernelManager):
    """A process that runs a notebook; it knows the client that talks to it."""

    talking: AsyncKernelClient | None = None

    def client(self, **options: Any) -> AsyncKernelClient:  # type: ignore[override]
        """The client of the notebook."""
        self.talking = super().client(**options)
        return self.talking

    @property
    def pid(self) -> int:
        """Number of the process."""
        return int(self.provisioner.pid)  # type: ignore[union-attr]

    def lives(self) -> bool:
        """Whether the process runs."""
        return bool(run_sync(self.is_alive)())

    def stop(self) -> None:
        """End the process, and the talk with it; a second time nothing happens."""
        try:
            if self.talking is not None:
                self.talking.stop_channels()
        finally:
            self.talking = None
            if self.has_kernel:
                run_sync(self.shutdown_kernel)(now=True)


class Kernels:
    """Starts kernels of this interpreter with this library, offline, whatever else is installed; at most one waits.

    A `with` block ends with none left.

    Args:
        folder: where notebooks run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: Kernel | None = None
        self._started: list[Kernel] = []
        ensure_event_loop(prefer_selector_loop=True)  # which sockets of a kernel need on Windows

    def __enter__(self) -> "Kernels":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as ends:
            for kernel in self._started:
                ends.callback(kernel.stop)

    def prepare(self, modules: Sequence[str]) -> None:
        """Start the kernel that the next notebook will take, unless one waits already; returns at once.

        Args:
            modules: of the library; it imports them without being asked.
        """
        if self._waiting is None:
            self._waiting = self._start(modules)

    def take(self) -> Kernel:
        """The kernel that waits and lives, or else a new one."""
        kernel, self._waiting = self._waiting, None
        return kernel if kernel is not None and kernel.lives() else self._start(())

    def _start(self, modules: Sequence[str]) -> Kernel:
        arguments = list(ARGUMENTS)
        if modules:
            names = ", ".join(f"'nmlib.{name}'" for name in modules)
            arguments.append(
                f"--IPKernelApp.exec_lines=assert list(map(__import__, [{names}]))"
            )  # leaves no name behind
        path = [str(Path(runtime.__file__).parent.parent), os.environ.get("PYTHONPATH")]
        wanted = {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "HF_HUB_OFFLINE": "1",
        }
        kernel = Kernel(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(
                kernel_dirs=[]
            ),  # no other kernel of that name: this interpreter's own
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
        self._started.append(kernel)
        run_sync(kernel.start_kernel)(extra_arguments=arguments, cwd=str(self._folder), env=os.environ | wanted)
        return kernel
