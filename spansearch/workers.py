"""Several workers of one study: processes of this machine, or tasks on a Dask cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import joblib
import torch
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

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
        run: makes the study and runs it; picklable.
        threads: of torch, for this worker; None: as many as torch takes.
        device: for this worker.
        families: registered by a program, and not by its study file.
        parent: the id of the process that asked; a worker of this machine does not outlive it.
    """

    run: Callable[[str], Ended]
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


def take_part(
    trials: int, timeout: float | None, longest: float | None, made: Callable[..., Any], device: str
) -> Ended:
    """Run a study in this process, as one worker.

    Args:
        longest: seconds that a trial may take.
        made: makes the study, given the device.
    """
    ended: Ended = made(device=device).run(trials, timeout, max_trial_seconds=longest)
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
    deaths, finished = 0, look()
    try:
        for order in wanted:
            begin(order)
        while executors:
            done, _ = wait(executors, timeout=POLL, return_when=FIRST_COMPLETED)
            now = look()
            deaths, finished = (0, now) if now > finished else (deaths, finished)
            for future in done:
                executor, order = executors.pop(future)
                error = future.exception()
                executor.shutdown(wait=False, kill_workers=True)
                if isinstance(error, BrokenProcessPool):
                    deaths += 1
                    log.warning("a worker died and is replaced; its trial is taken up again")
                    if deaths >= DEATHS:
                        raise StudyError(
                            f"{DEATHS} workers in a row died without finishing a trial: killed by the system "
                            "for their memory? Use fewer workers, a smaller memory_budget or smaller "
                            "batches. What was finished is kept; the same command continues."
                        ) from error
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
    address: str, wanted: Sequence[Order], look: Callable[[], int], stop: Callable[[], None]
) -> Ended:
    """Run workers as tasks of a Dask cluster, through joblib, until the study has ended.

    A task whose machine is gone is run again by Dask, and joins the study again.

    Args:
        address: of the scheduler, ``tcp://host:8786``.
        look: called again and again, to show what is new.
        stop: asks all workers of the study to leave.

    Raises:
        TaskError: Dask is not installed. StudyError: the cluster cannot be reached, or what a worker raised.
    """
    with _cluster(address), ThreadPoolExecutor(1) as thread:

        def run() -> list[Ended]:
            with joblib.parallel_config(backend="dask", scheduler_host=address):
                each = (joblib.delayed(carry_out)(order) for order in wanted)
                return list(joblib.Parallel(n_jobs=len(wanted), batch_size=1)(each))

        future = thread.submit(run)
        try:
            while not future.done():
                look()
                time.sleep(POLL)
        except KeyboardInterrupt:
            stop()
            wait([future], timeout=None)
            return "interrupted"
        look()
        return _together(future.result())


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    try:
        import distributed
    except ImportError as error:
        raise TaskError(
            "--dask needs Dask, which is not installed: pip install 'spansearch[dask]' (here and on the "
            "machines of the cluster)."
        ) from error
    try:
        distributed.Client(address, timeout="10s", set_as_default=False).close()
    except (OSError, ValueError, TimeoutError) as error:
        raise StudyError(
            f"No Dask scheduler answers at {address}: {error}. Start one with `dask scheduler`, workers with "
            "`dask worker ADDRESS --nthreads 1`, and give its address, tcp://host:8786."
        ) from error
    yield


def _together(ended: Sequence[Ended]) -> Ended:
    for one in ended:
        if one != "done":
            return one
    return "done"
