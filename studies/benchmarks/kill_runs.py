"""Runs of a study whose processes are killed again and again, and what is found afterwards."""

import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from optuna.trial import TrialState, create_trial

import spansearch as ss
from benchmarks.kill_study import MOMENTS
from spansearch.assignments import Assignments
from spansearch.errors import StudyError
from spansearch.events import read_events
from spansearch.store import find_study
from spansearch.trials import FINISHED

STUDY = Path(__file__).with_name("kill_study.py")
NAME = "killed"
SHARE = 6  # trials of a process, at least
PATIENCE = 1200.0
"""Seconds after which a run that does not end counts as stuck."""


@dataclass
class Report:
    """What became of a study that was killed.

    Attributes:
        kills: by the moment, how many processes died there; ``any`` at a random time.
        lost: numbers of trials that were finished once and later were not, or came to something else.
        stuck: of trials that nobody finished.
        duplicates: numbers that two trials have, and missing ones.
        damaged: of trials whose student does not open or is another one than was kept.
        total, finished: trials asked for, and those there are.
        differs: of trials that differ from those of a run that was left alone; None where that was not asked.
        seconds: of all processes together, by the clock.
        errors: exit statuses other than 0 of processes that nobody killed, with the end of what they said.
    """

    kills: dict[str, int] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    total: int = 0
    finished: int = 0
    differs: list[int] | None = None
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def flawless(self) -> bool:
        return (
            not (self.lost or self.stuck or self.duplicates or self.damaged or self.differs or self.errors)
            and self.finished == self.total
        )


@dataclass
class Runner:
    """Starts processes that run one study.

    Attributes:
        directory: of the run.
        storage: its URL; None for that of the directory.
        total: trials asked for.
    """

    directory: Path
    storage: str | None
    total: int

    def start(
        self, kill_at: str = "", slowly: float = 0.0, lease: float | None = None, trials: int | None = None
    ) -> subprocess.Popen[bytes]:
        storage = ["--storage", self.storage] if self.storage else []
        command = [sys.executable, "-m", "spansearch", "run", str(STUDY), "--dir", str(self.directory)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": kill_at}
        environment |= {"SLOWLY": str(slowly)} if slowly else {}
        environment |= {"LEASE": str(lease)} if lease else {}
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "said.log").open("ab") as said:
            asked = ["--trials", str(trials or self.total)]
            return subprocess.Popen([*command, *asked, *storage], stdout=said, stderr=said, env=environment)

    def table(self) -> dict[int, tuple[Any, ...]]:
        """Of every finished trial what may not depend on how often a process was killed."""
        try:
            trials = find_study(self.storage, self.directory, NAME).get_trials(states=FINISHED)
        except StudyError:  # not begun
            return {}
        rows = {}
        for trial in trials:
            details = {k: v for k, v in trial.user_attrs.get("details", {}).items() if k != "seconds"}
            attributes = {**trial.user_attrs, "details": details}
            rows[trial.number] = (trial.state.name, trial.params, trial.values, attributes)
        return rows

    def finish(self, report: Report, kept: dict[int, tuple[Any, ...]]) -> Report:
        """Let one process run to the end, then look at everything."""
        started = time.monotonic()
        process = self.start()
        self._wait(process, report)
        report.seconds += time.monotonic() - started
        return self.examine(report, kept)

    def examine(self, report: Report, kept: dict[int, tuple[Any, ...]]) -> Report:
        trials = find_study(self.storage, self.directory, NAME).trials
        now = self.table()
        numbers = [trial.number for trial in trials]
        report.total, report.finished = self.total, len(now)
        report.lost = [number for number, row in kept.items() if now.get(number) != row]
        report.stuck = [trial.number for trial in trials if not trial.state.is_finished()]
        report.duplicates = sorted(
            {n for n in numbers if numbers.count(n) > 1} | set(range(len(now))) - set(now)
        )
        for number, (_, _, _, attributes) in now.items():
            entry = attributes["details"].get("student")
            if entry is not None and not _is_whole(
                self.directory / "students" / entry["file"], entry["sha256"]
            ):
                report.damaged.append(number)
        return report

    def _wait(self, process: subprocess.Popen[bytes], report: Report) -> None:
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status:
            report.errors.append(f"status {status}: {(self.directory / 'said.log').read_text()[-500:]}")


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def moments(count: int, draw: random.Random) -> list[str]:
    """So many moments to die at: every kind in turn, and every third time any time at all."""
    kinds = list(MOMENTS)
    draw.shuffle(kinds)
    return ["any" if k % 3 == 2 else kinds[(k - k // 3) % len(kinds)] for k in range(count)]


def killed_again_and_again(
    runner: Runner, kills: int, seed: int, alone: dict[int, tuple[Any, ...]] | None = None
) -> Report:
    """One process at a time, each of which dies; then one that is left alone.

    Args:
        alone: the table of a run that was never killed.
    """
    draw, report, kept = random.Random(seed), Report(), {}
    for number, moment in enumerate(moments(kills, draw)):
        started = time.monotonic()
        first = moment in ("recording", "screening")  # happens once in a process
        at = (
            ""
            if moment == "any"
            else f"{moment}:{1 if first else draw.randint(1, 4)}:{draw.choice(('', 'late'))}"
        )
        # a share of what is left: one whose moment does not come leaves something for the others
        share = max(SHARE, math.ceil((runner.total - len(kept)) / (kills - number + 1)))
        process = runner.start(at, trials=min(runner.total, len(kept) + share))
        try:
            status = process.wait(draw.uniform(0.5, 6.0) if moment == "any" else PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            status = process.wait()
        report.seconds += time.monotonic() - started
        if status == -signal.SIGKILL:
            report.kills[moment] = report.kills.get(moment, 0) + 1
        elif status:
            report.errors.append(f"status {status}: {(runner.directory / 'said.log').read_text()[-500:]}")
        now = runner.table()
        report.lost += [number for number, row in kept.items() if now.get(number) != row]
        kept = now
    runner.finish(report, kept)
    if alone is not None:
        now = runner.table()
        report.differs = sorted(n for n in {*alone, *now} if alone.get(n) != now.get(n))
    return report


def killed_in_a_crowd(
    runner: Runner, workers: int, kills: int, seed: int, every: Sequence[float] = (1.0, 3.0)
) -> Report:
    """Several processes at once, one of which is killed every few seconds, and another one started."""
    draw, report = random.Random(seed), Report()
    started = time.monotonic()
    crowd = [runner.start(slowly=0.2) for _ in range(workers)]
    while sum(report.kills.values()) < kills and any(one.poll() is None for one in crowd):
        time.sleep(draw.uniform(*every))
        living = [one for one in crowd if one.poll() is None]
        if not living:
            break
        victim = draw.choice(living)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        report.kills["any"] = report.kills.get("any", 0) + 1
        crowd[crowd.index(victim)] = runner.start(slowly=0.2)
    for one in crowd:
        runner._wait(one, report)
    report.seconds = time.monotonic() - started
    return runner.examine(report, {})


def paused(runner: Runner, lease: float) -> Report:
    """Two processes, one of which is stopped in the middle of a trial until its lease has run out and the
    other one has finished the study; then it wakes up.

    Args:
        lease: seconds, short enough to wait for.
    """
    report = Report()
    started = time.monotonic()
    first = runner.start(slowly=0.5, lease=lease)
    while not any(event["event"] == "took" for _, event in read_events(runner.directory)):
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    other = runner.start(lease=lease)
    runner._wait(other, report)
    first.send_signal(signal.SIGCONT)
    runner._wait(first, report)  # it survives, and sees that there is nothing left to do
    report.kills["paused"] = 1
    report.seconds = time.monotonic() - started
    return runner.examine(report, {})


def together(runner: Runner, workers: int) -> Report:
    """Some processes at once, nobody killed; seconds are from the first trial to the last."""
    report = Report()
    crowd = [runner.start(slowly=0.05) for _ in range(workers)]
    for one in crowd:
        runner._wait(one, report)
    runner.examine(report, {})
    trials = find_study(runner.storage, runner.directory, NAME).trials
    began = min(trial.datetime_start for trial in trials if trial.datetime_start)
    ended = max(trial.datetime_complete for trial in trials if trial.datetime_complete)
    report.seconds = (ended - began).total_seconds()
    return report


def long_study(directory: Path, length: int) -> dict[str, float]:
    """Seconds until a study of very many trials, written down without being made, begins its next one; and to
    ask for one (median)."""
    study = ss.Study.open(STUDY, directory=directory)
    study.run(30)
    models = [trial for trial in study.optuna.trials if trial.state is TrialState.COMPLETE]
    draw = random.Random(0)
    missing = length - len(study.optuna.trials)
    for _ in range(missing):
        one = draw.choice(models)
        study.optuna.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                params={**one.params, "width": draw.uniform(0.04, 1.0)},
                distributions=one.distributions,
                values=[value * draw.uniform(0.5, 2.0) for value in one.values],
                user_attrs=one.user_attrs,
                system_attrs=one.system_attrs,
            )
        )
    began, asks = [], []
    again = ss.Study.open(STUDY, directory=directory)
    original = Assignments.next

    def timed(self: Assignments, total: int) -> Any:
        started = time.perf_counter()
        given = original(self, total)
        asks.append(time.perf_counter() - started)
        began.append(time.perf_counter())
        return given

    Assignments.next = timed  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        again.run(length + 8)
    finally:
        Assignments.next = original  # type: ignore[method-assign]
    return {"resume": began[0] - started, "ask": median(asks[1:-1])}
