"""A pool of real processes with a gloo process group, kept for the whole test session.

To import torch and diffusers takes ten seconds, so one process does it, from which all workers are forked. A pool
starts when the first test asks for it and serves all of them:

    def sums(rank: int, scale: float) -> float: ...        # module level: workers import it by name

    def test_sums(two_ranks): assert two_ranks.run(sums, 2.0) == [3.0, 3.0]

The workers inherit the parent's `sys.path`, so a test module is importable there under the name that pytest gave it.
The store that the ranks meet through lives in the parent: no free port to guess, and it outlives any worker. A pool
in which anything failed is thrown away, because a process group in which one rank raised and another waits is of no
further use; the next `run` starts a new one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["Pool", "PoolError"]

TIMEOUT = 240.0  # seconds that `run` waits for all ranks
GROUP_TIMEOUT = 120.0  # seconds that a collective waits
START_TIMEOUT = 120.0  # seconds to import torch and meet
GRACE = 20.0  # seconds that the others get to answer after one rank has failed

IMPORTED = [
    "torch._inductor.compile_fx",
    "torchao.quantization",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.pipelines.pipeline_utils",
]
"""Before the workers are forked. Nothing that starts a thread: `paracompile.backend` does."""


class PoolError(AssertionError):
    """A rank raised, died or did not answer; the message holds every rank's traceback."""


class Pool:
    """`size` worker processes, started at the first `run`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call ``function(rank, *args)`` on every rank at once.

        Args:
            function: of a module's top level. Its arguments and result travel by pickle, tensors by value.
            timeout: seconds for all ranks together, the pool's start not counted.

        Returns:
            the results by rank.

        Raises:
            PoolError: with the tracebacks of all ranks that failed; the pool is then started anew by the next call.
        """
        self._start()
        task = pickle.dumps((function, args))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(task)
            except OSError as error:
                self.close()
                raise PoolError(f"rank {rank} died between two runs") from error
        return self._answers(f"{function.__module__}.{function.__qualname__}", timeout)

    def close(self) -> None:
        """End the workers: politely, then by a kill."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        deadline = time.monotonic() + 5
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        if self._workers:
            return
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (rank, self.size, self._store.port, there)
            worker = context.Process(target=_work, args=arguments, daemon=True, name=f"rank {rank}")
            worker.start()
            there.close()
            self._workers.append(worker)
            self._pipes.append(here)
        self._answers("the start", START_TIMEOUT)

    def _answers(self, what: str, timeout: float) -> list[Any]:
        """One answer from every rank. Any failure closes the pool."""
        results: list[Any] = [None] * self.size
        troubles: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        deadline = time.monotonic() + timeout
        try:
            while waiting and time.monotonic() < deadline:
                for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                    assert isinstance(pipe, Connection)
                    rank = waiting.pop(pipe)
                    try:
                        fine, answer = pickle.loads(pipe.recv_bytes())
                    except (EOFError, OSError):
                        self._workers[rank].join(5)
                        fine, answer = False, f"died with exit code {self._workers[rank].exitcode}"
                    if fine:
                        results[rank] = answer
                    else:
                        troubles[rank] = answer
                        deadline = min(deadline, time.monotonic() + GRACE)
            for rank in waiting.values():
                troubles[rank] = "did not answer in time; its stack is in the captured stderr"
                self._show_stack(self._workers[rank])
        except BaseException:  # an interrupt, or pytest-timeout: answers still to come must not meet the next task
            self._kill()
            raise
        if troubles:
            self._kill() if waiting else self.close()
            told = "\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(troubles.items()))
            raise PoolError(f"{what} on {self.size} ranks:\n{told}")
        return results

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        self.close()

    @staticmethod
    def _show_stack(worker: BaseProcess) -> None:
        if worker.pid is not None and worker.is_alive():
            os.kill(worker.pid, signal.SIGUSR1)
            time.sleep(0.5)


def _work(rank: int, size: int, port: int, pipe: Connection) -> None:
    """A worker's life: meet the others, then one task after the other until an empty message or a closed pipe."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # The sandbox may have no address for its host name.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), GLOO_SOCKET_IFNAME="lo")
    from datetime import timedelta

    import torch
    import torch._inductor.config
    import torch.distributed as dist
    from quick_compiles import quick_compiles

    def answer(function: Callable[[], Any]) -> None:
        try:
            message = pickle.dumps((True, function()))
        except BaseException:  # noqa: BLE001 - whatever it was, the parent is waiting for an answer
            message = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(message)

    def meet() -> None:
        quick_compiles()
        torch._inductor.config.compile_threads = 1  # two cores are shared by up to four workers
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=GROUP_TIMEOUT))
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=GROUP_TIMEOUT)
        )

    def task() -> Any:
        function, args = pickle.loads(message)
        return function(rank, *args)

    answer(meet)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while message := pipe.recv_bytes():
            answer(task)
            # What one test compiled must not be found by the next; importing Dynamo only to reset it takes seconds.
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
