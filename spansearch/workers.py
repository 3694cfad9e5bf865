"""Several workers of one study: processes of this machine, or tasks on a Dask cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from spansearch.budget import Budget
from spansearch.errors import StudyError, TaskError
from spansearch.loop import Ended
from spansearch.store import MODULE_PREFIX
from spansearch.students import families, register

log = logging.getLogger("spansearch")

POLL = 0.2
GRACE = 5.0
"""Seconds that a worker has to stop in, when the process that asked for it is gone."""
DEATHS = 10
"""So many workers may die without a trial finished in between; then something is wrong with all of them."""


@dataclass(frozen=True)
class Order:
    """What a worker has to know; it travels to its process.

    Attributes:
        run: makes the study and runs it; picklable. Not shown: it knows the storage's password.
        threads: of torch, for this worker; None: as many as torch takes.
        device: for this worker.
        families: registered by a program, and not by its study file.
        parent: the id of the process that asked; a worker of this machine does not outlive it. None for one
            that runs in a process of somebody else's.
    """

    run: Callable[[str], Ended] = field(repr=False)
    device: str
    threads: int | None = None
    families: Mapping[str, type] = field(default_factory=dict)
    parent: int | None = None


def carry_out(order: Order) -> Ended:
    """A worker's whole life."""
    for name, kind in order.families.items():
        if name not in families:
            register(name)(kind)
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    logger = logging.getLogger("spansearch")
    if not logger.handlers:  # what it says is in the log of the run, and is shown from there
        logger.addHandler(logging.NullHandler())
        logger.setLevel(logging.INFO)
    if order.parent is not None:
        threading.Thread(target=_watch, args=(order.parent,), daemon=True).start()
    return order.run(order.device)


def _is_of_program(kind: type) -> bool:
    """Is a family neither ours nor of a study file, which a worker reads by itself?"""
    return not kind.__module__.startswith(("spansearch.", MODULE_PREFIX))


def take_part(budget: Budget, command: str, made: Callable[..., Any], device: str) -> Ended:
    """Run a study in this process, as one worker.

    Args:
        command: id of the command that began this worker and others.
        made: makes the study, given the device.
    """
    ended: Ended = made(device=device).take_part(budget, command)
    return ended


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os._exit(1)  # safe at any moment: that is tested


def orders(run: Callable[[str], Ended], count: int, device: str) -> list[Order]:
    """For each of some workers of this machine; they share its threads and its CUDA devices."""
    own = {name: type(kind) for name, kind in families.items() if _is_of_program(type(kind))}
    threads = max(1, torch.get_num_threads() // count)
    cards = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    devices = [f"cuda:{number % cards}" if cards > 1 else device for number in range(count)]
    return [Order(run, one, threads, own, os.getpid()) for one in devices]


class _Deaths:
    """Counts the workers that died in a row, none of which finished a trial in between."""

    def __init__(self, finished: int) -> None:
        self._count, self._finished = 0, finished

    def see(self, finished: int) -> None:
        if finished > self._finished:
            self._count, self._finished = 0, finished

    def another(self, error: BaseException) -> None:
        """One more; StudyError where that is too many."""
        self._count += 1
        log.warning("a worker died and is replaced; its trial is taken up again")
        if self._count >= DEATHS:
            raise StudyError(
                f"{DEATHS} workers in a row died without finishing a trial: killed by the system for their "
                "memory? Use fewer workers, a smaller memory_budget or smaller batches. What was finished is "
                "kept; the same command continues."
            ) from error


def supervise(wanted: Sequence[Order], look: Callable[[], int]) -> Ended:
    """Run workers as processes until the study has ended; one that dies is replaced.

    Each is an executor of its own: in one of several processes, one that dies takes the others with it.

    Args:
        look: called again and again, to show what is new; returns how many trials are finished.

    Raises:
        StudyError: what a worker raised; or worker after worker died.
    """
    executors: dict[Future[Ended], tuple[ProcessPoolExecutor, Order]] = {}

    def begin(order: Order) -> None:
        executor = ProcessPoolExecutor(max_workers=1, env={"OMP_NUM_THREADS": str(order.threads or 1)})
        executors[executor.submit(carry_out, order)] = executor, order

    ended: list[Ended] = []
    deaths = _Deaths(look())
    try:
        for order in wanted:
            begin(order)
        while executors:
            done, _ = wait(executors, timeout=POLL, return_when=FIRST_COMPLETED)
            deaths.see(look())
            for future in done:
                executor, order = executors.pop(future)
                error = future.exception()
                executor.shutdown(wait=False, kill_workers=True)
                if isinstance(error, BrokenProcessPool):
                    deaths.another(error)
                    begin(order)
                elif error is not None:
                    raise error
                else:
                    ended.append(future.result())
    except KeyboardInterrupt:
        ended.append("interrupted")
    finally:
        for executor, _ in executors.values():
            executor.shutdown(wait=True, kill_workers=True)
    look()
    return _together(ended)


def on_cluster(
    address: str,
    wanted: Sequence[Order],
    device: str,
    look: Callable[[], int],
    stop: Callable[[], None],
) -> Ended:
    """Run workers as tasks of a Dask cluster until the study has ended.

    A task whose machine is gone is run again by Dask, elsewhere, and joins the study again. Not through
    joblib's backend: that runs tasks in this process where the cluster has one thread.

    Args:
        address: of the scheduler, ``tcp://host:8786``.
        wanted: what they have to know; of Dask's own processes neither threads nor devices are changed, and
            they do not end with the one that asked.
        device: for all of them, as it was asked for: what "auto" is, they see there.
        look: called again and again, to show what is new; returns how many trials are finished.
        stop: asks these workers to leave.

    Raises:
        TaskError: Dask is not installed. StudyError: the cluster cannot be reached; what a worker raised; or
            worker after worker died.
    """
    with _connected(address) as client:
        from distributed.scheduler import KilledWorker

        running: dict[Any, Order] = {}

        def begin(order: Order) -> None:
            running[client.submit(carry_out, order, pure=False)] = order

        ended: list[Ended] = []
        deaths = _Deaths(look())
        try:
            for order in wanted:
                begin(replace(order, parent=None, threads=None, device=device))
            if not client.scheduler_info()["workers"]:
                log.info("no worker has joined the cluster at %s yet: waiting for one", address)
            while running:
                time.sleep(POLL)
                deaths.see(look())
                for future in [one for one in running if one.done()]:
                    order = running.pop(future)
                    try:
                        ended.append(future.result())
                    except KilledWorker as error:
                        deaths.another(error)
                        begin(order)
        except CancelledError as error:
            raise StudyError(
                f"The Dask scheduler at {address} is gone, or took the workers' tasks back: {error}. Workers "
                "that still run go on; the same command joins them."
            ) from error
        except BaseException as error:
            with suppress(Exception):  # the storage may be what failed
                stop()
            client.cancel(list(running))  # those that have not begun
            if not isinstance(error, KeyboardInterrupt):
                raise
            log.info("asked the workers on %s to leave: each does when its trial is finished", address)
            ended.append("interrupted")
        look()
        return _together(ended)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        import distributed
    except ImportError as error:
        raise TaskError(
            "--dask needs Dask, which is not installed: pip install 'spansearch[dask]' (here and on the "
            "machines of the cluster)."
        ) from error
    try:
        client = distributed.Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise StudyError(
            f"No Dask scheduler answers at {address}: {error}. Start one with `dask scheduler`, workers with "
            "`dask worker ADDRESS --nthreads 1`, and give its address, tcp://host:8786."
        ) from error
    with client:
        yield client


def _together(ended: Sequence[Ended]) -> Ended:
    for one in ended:
        if one != "done":
            return one
    return "done"
