"""How a study is run: by this process as one worker, or by others while this one looks on."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from optuna.study import Study as OptunaStudy

from spansearch.budget import Budget
from spansearch.errors import unsaved
from spansearch.events import Events
from spansearch.loop import Ended, Loop, OnTrial
from spansearch.onlooker import Onlooker
from spansearch.patience import Patience
from spansearch.search import Space
from spansearch.store import Crew, StudentFiles, StudyLock, database_errors
from spansearch.trials import FINISHED
from spansearch.workbench import Workbench
from spansearch.workers import on_cluster, orders, supervise, take_part

log = logging.getLogger("spansearch")


def stoppable(run: Callable[[], Ended], url: str | None, directory: Path) -> Ended:
    """What a run ended with; ``interrupted`` where the user stopped it.

    Raises:
        StudyError: the storage cannot be used.
    """
    with database_errors(url, directory):
        try:
            return run()
        except KeyboardInterrupt as stop:
            if unsaved(stop):  # it came while a full disk was being dealt with
                raise
            return "interrupted"


def is_over(study: OptunaStudy, budget: Budget) -> Ended | None:
    """What is said of a study that has all its trials, or no time left; None for any other."""
    if len(study.get_trials(deepcopy=False, states=FINISHED)) >= budget.trials:
        log.info("%s: all of %d trials are done", study.study_name, budget.trials)
        return "done"
    spent = study.user_attrs.get("seconds", {}).get("total", 0.0)
    if budget.timeout is not None and spent >= budget.timeout:
        log.info("%s: the timeout of %.0f s was reached before", study.study_name, budget.timeout)
        return "timeout"
    return None


def run_here(
    study: OptunaStudy,
    url: str | None,
    bench: Workbench,
    space: Space,
    files: StudentFiles,
    budget: Budget,
    on_trial: OnTrial | None = None,
    command: str | None = None,
) -> Ended:
    """Take part in a study as one worker, until it has ended.

    Args:
        url: of the storage; None for that of the run's directory.
        command: id of the command that began this worker and others.
    """
    directory = bench.directory
    crew = Crew(study, StudyLock(study, url, directory), directory)
    events = Events(directory, crew.worker)
    files.clean()
    with crew.joined(budget.trials, Patience(url, directory, events)), events.messages():
        events.say("joined", pid=os.getpid(), host=socket.gethostname(), trials=budget.trials)
        ended: Ended | Literal["failed"] = "failed"
        try:
            longest = budget.max_trial_seconds
            loop = Loop(study, url, bench, space, files, crew, events, longest, command)
            ended = loop.run(budget.trials, budget.timeout, on_trial)
            return ended
        except KeyboardInterrupt:
            ended = "interrupted"
            raise
        finally:
            events.say("left", why=ended)


def run_elsewhere(
    study: OptunaStudy,
    url: str | None,
    directory: Path,
    made: Callable[..., Any],
    device: str,
    count: int,
    dask: str | None,
    budget: Budget,
    on_trial: OnTrial | None = None,
) -> Ended:
    """Let workers in other processes run a study, and look on until it has ended.

    Args:
        made: makes the spansearch.Study in such a process, given the device; picklable.
        count: of workers.
        dask: address of the scheduler of a cluster to run them on; None: on this machine.
    """
    command = uuid.uuid4().hex
    wanted = orders(partial(take_part, budget, command, made), count, device)
    patiently = Patience(url, directory, Events(directory, "onlooker"))
    onlooker = Onlooker(study, directory, on_trial, patiently)
    if dask is None:
        return supervise(wanted, onlooker.look)
    return on_cluster(dask, wanted, device, onlooker.look, partial(onlooker.stop, command))
