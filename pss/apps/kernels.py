"""Kernels of many notebooks, each forked from one process that has imported once what all of them import."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial, partialmethod
from importlib import import_module
from multiprocessing import current_process
from typing import Any

from jupyter_client import AsyncKernelManager

# Imported there and not used: torch has no threads yet when a kernel is forked, and OpenBLAS ends its own before. The
# third line is what torch imports when first asked for a gradient of every sample, or whether tensors are close.
_IMPORTED = ("ipykernel.kernelapp", "matplotlib.pyplot", "seaborn", "sklearn.datasets", "pss.data", "pss.input_space")
_IMPORTED += ("pss.models", "pss.neighbors", "pss.patches", "pss.plots", "pss.statistics")
_IMPORTED += ("torch._dynamo", "torch.distributed.tensor")
BACKEND = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as ipykernel has it; read when first imported


class Manager(AsyncKernelManager):
    """Interrupts no kernel that it closes: one that has just answered would tell of it as an error."""

    async def _async_interrupt_kernel(self) -> None:
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


class ForkingManager(Manager):
    """Has kernels forked by a server, which starts with the first one; on Linux, elsewhere they start as usual."""

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        if sys.platform == "linux" and "ipykernel_launcher" in kernel_cmd and kernel_cmd[0] == sys.executable:
            self.provisioner.launch_kernel = partial(_launch, self.provisioner)
        await super()._async_launch_kernel(kernel_cmd, **options)


async def _launch(provisioner: Any, cmd: Sequence[str], **options: Any) -> Mapping[str, Any]:
    provisioner.cwd, asked = options.get("cwd") or os.getcwd(), cmd[cmd.index("ipykernel_launcher") + 1 :]
    provisioner.process = _Process(asked, dict(options["env"]), str(provisioner.cwd))
    provisioner.pid = provisioner.pgid = provisioner.process.pid
    return provisioner.connection_info


@cache
def _server() -> subprocess.Popen:
    """The server of this process, with the environment as it is when first asked for; it ends with this process."""
    turned = current_process().name.endswith(tuple("02468"))
    command = [sys.executable, "-c", f"from {__name__} import serve; serve({turned})"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class _Process:
    """A forked kernel, in the place of a process of `subprocess`."""

    stdin = stdout = stderr = None

    def __init__(self, *asked: Any):
        server = _server()
        print(json.dumps(asked), file=server.stdin, flush=True)
        self.pid = int(server.stdout.readline())

    def poll(self) -> int | None:
        try:
            self.send_signal(0)
        except ProcessLookupError:
            return 0  # how it ended only its parent knows
        return None

    wait = poll

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    kill = partialmethod(send_signal, signal.SIGKILL)
    terminate = partialmethod(send_signal, signal.SIGTERM)


def serve(turned: bool = False) -> None:
    """Fork a kernel for every line that is read, and write its process id.

    Every other one imports in ``turned`` order: in a new environment it finds compiled what the one beside it has read.
    """
    for module in reversed(_IMPORTED) if turned else _IMPORTED:
        with suppress(ImportError):
            import_module(module)
    gc.freeze()  # a kernel's own collections, and its last, leave alone what it shares: each would copy all of it
    usual = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGCHLD)}
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            for number, handler in usual.items():
                signal.signal(number, handler)
            return _kernel(*json.loads(line))
        print(pid, flush=True)


def _kernel(arguments: list[str], environment: Mapping[str, str], folder: str) -> None:
    """What a forked process does: as if it had been started in this folder, with this environment."""
    from ipykernel.kernelapp import launch_new_instance

    server = os.getppid()
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [place for place in dict.fromkeys([*first, *sys.path]) if place]
    sys.argv[1:] = arguments
    launch_new_instance([*arguments, f"--IPKernelApp.parent_handle={server}"])  # it ends with the server
