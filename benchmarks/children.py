"""Processes beside the one that measures. Nothing is left of them: they end with their block, and with their parent, however it ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
START = 60.0  # seconds for a process to start and say its first word, on a machine that is busy


@dataclass(frozen=True)
class Child:
    """A process, and the pipe to it."""

    process: BaseProcess
    pipe: Connection

    def heard(self, deadline: float = START) -> Any:
        """What it says next.

        Raises:
            SystemExit: it has ended, or is silent.
        """
        if not self.pipe.poll(deadline):
            raise SystemExit(f"a process said nothing for {deadline:g} s")
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"a process has ended with code {self.process.exitcode}") from None


def _run(work: Callable[..., object], parent: int, pipe: Connection, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # else it has ended before
        work(pipe, *args)


@contextmanager
def child(work: Callable[..., object], *args: Any) -> Iterator[Child]:
    """A new process that runs `work(pipe, *args)`, where `work` is a function of a module."""
    spawn = multiprocessing.get_context("spawn")  # not forked: it must not inherit threads or connections
    here, there = spawn.Pipe()
    process = spawn.Process(target=_run, args=(work, os.getpid(), there, args), daemon=True)
    process.start()
    there.close()
    try:
        yield Child(process, here)
    finally:
        process.kill()
        process.join()
        here.close()
