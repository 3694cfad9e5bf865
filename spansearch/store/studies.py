"""The Optuna study in a storage: found, created, or refused because it is another one."""

from __future__ import annotations

import math
import random
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import optuna

from spansearch.errors import SaveError, StudyError
from spansearch.store.database import database_errors, file_of, make_directory, open_storage, shown
from spansearch.store.locks import NotLockedError, StudyLock, acquire, lock_file
from spansearch.store.places import write_durably
from spansearch.store.source import run_beside

OBJECTIVES = 2  # the loss, and a cost
STUDENTS = "students"
MARK = ".students"
"""The file by which a run's directory is known again on another machine, where it has another path."""
STUDY_VALUES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("fingerprint", "teacher", "linear_errors", "missed", "rates", "seconds", "test"), dict),
    **dict.fromkeys(("students", "repaired", "network", "sufficiency"), dict),
    "seeds": list,
    "stopped": list,
}
"""Kinds of the user attributes of a study."""
TRIAL_VALUES: dict[str, type | tuple[type, ...]] = {"details": dict, "measures": dict, "recipe": list}
READING = 5.0
"""Seconds for which who only reads lets others begin: where a worker that was stopped holds the lock, the
study is there."""
ATTEMPTS = 10
"""To begin a study in a database, where others do so at the same time."""


class NoStudyError(StudyError):
    """There is no study of this name yet."""


def find_study(url: str | None, directory: Path, name: str, study_file: Path | None = None) -> optuna.Study:
    """The study of a run.

    Args:
        study_file: a run beside it is named where there is none in the directory.

    Raises:
        NoStudyError: there is none of this name. StudyError: the storage cannot be used.
    """
    directory = directory.absolute()
    start = f"Start one with: spansearch run STUDY --dir {directory}"
    file = file_of(url, directory)
    if file is not None and not file.exists():
        if url is not None:
            raise NoStudyError(f"There is no {shown(url, directory)}. {start}")
        beside = run_beside(study_file, name, directory) if study_file is not None else ""
        raise NoStudyError(
            f"No study in {directory}.{beside} {start} (or, if it was run with --storage, give that again)."
        )
    return _while_nobody_begins(url, directory, lambda: _load(url, directory, name, start), READING)


def _load(url: str | None, directory: Path, name: str, start: str) -> optuna.Study:
    storage = open_storage(url, directory)
    with database_errors(url, directory):
        names = [study.study_name for study in storage.get_all_studies()]
        if name not in names:
            raise NoStudyError(f"{_other(url, directory, names)} {start}")
        return _sound(optuna.load_study(study_name=name, storage=storage), url, directory)


def _sound(study: optuna.Study, url: str | None, directory: Path) -> optuna.Study:
    """The study, where what is written of it is of the kinds that are written; it is data, whoever wrote it.

    Raises:
        StudyError: it is not.
    """
    trials = study.get_trials(deepcopy=False)
    values = [("the study", key, value, STUDY_VALUES.get(key)) for key, value in study.user_attrs.items()]
    for trial in trials:
        about = f"trial {trial.number}"
        values += [(about, key, value, TRIAL_VALUES.get(key)) for key, value in trial.user_attrs.items()]
    for about, key, value, kinds in values:
        if kinds is not None and not isinstance(value, kinds):
            raise StudyError(
                f"In {shown(url, directory)} {key!r} of {about} is {str(value)[:40]!r}, which spansearch "
                "does not write: it was damaged or changed by hand. Restore it, or give another --dir or "
                "--storage."
            )
    return study


def open_study(
    url: str | None,
    directory: Path,
    name: str,
    fingerprint: Mapping[str, Any],
    students: str | None = None,
) -> optuna.Study:
    """The study of a run, created where there is none.

    Args:
        fingerprint: everything that makes trials comparable, as plain data; kept with the study.
        students: URL of the bucket they are to be kept in; None: where they are, or the run's directory.

    Raises:
        StudyError: the directory holds another study, the study was created with another fingerprint (lists
            the fields that differ), or the storage cannot be used.
    """
    if file_of(url, directory) is not None:
        make_directory(directory)
    study = _while_nobody_begins(url, directory, lambda: _load_or_create(url, directory, name))
    with StudyLock(study, url, directory).held():
        _require_same_inputs(study, url, directory, fingerprint)
        _require_same_students(study, url, directory, students)
    return study


def _while_nobody_begins(
    url: str | None, directory: Path, opened: Callable[[], optuna.Study], seconds: float | None = None
) -> optuna.Study:
    """Open a storage while no other process does: whoever comes first makes the tables, not at one stroke.

    Args:
        seconds: to wait for another process at most, and then to open it all the same; None: as long as it
            takes.
    """
    file = file_of(url, directory)
    if file is not None:
        lock = filelock.FileLock(lock_file(file))
        try:
            acquire(lock, seconds, shown(url, directory))
        except (OSError, NotLockedError):  # if something is wrong with the place, opening says better what
            return opened()
        try:
            return opened()
        finally:
            lock.release()
    for attempt in range(ATTEMPTS):
        try:
            return opened()
        except (SaveError, optuna.exceptions.DuplicatedStudyError) as error:
            begun = isinstance(error, optuna.exceptions.DuplicatedStudyError) or "already exist" in str(error)
            if not begun or attempt + 1 == ATTEMPTS:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


def _load_or_create(url: str | None, directory: Path, name: str) -> optuna.Study:
    storage = open_storage(url, directory)
    with database_errors(url, directory):
        names = [study.study_name for study in storage.get_all_studies()]
        if name in names:
            return _sound(optuna.load_study(study_name=name, storage=storage), url, directory)
        if names and url is None:
            raise StudyError(f"{_other(url, directory, names)} Give this one another --dir.")
        return optuna.create_study(study_name=name, storage=storage, directions=["minimize"] * OBJECTIVES)


def _require_same_inputs(
    study: optuna.Study, url: str | None, directory: Path, fingerprint: Mapping[str, Any]
) -> None:
    """A new study is described; of one that is known everything has to be as it was."""
    stored = study.user_attrs.get("fingerprint")
    if stored is None:  # new, or died before it was described: nothing has been tried yet
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["loss", fingerprint.get("search", {}).get("cost", "flops")])
        study.set_user_attr("fingerprint", dict(fingerprint))
    elif stored != fingerprint:
        require_same_format(directory, stored, fingerprint.get("format", 0))
        fields = differences(stored, fingerprint)
        where = ""
        if any(field.split(".")[0] == "search" for field in fields):
            where = " Settings of the search are SEARCH in the study file, or Study(search=...)."
        if "search.seed" in fields:
            where += (
                f" Its seed was {stored['search']['seed']}: give it with --seed, or Study.open(seed=...)."
            )
        for field in fields:
            name = field.removeprefix("search.")
            if field.startswith("search.max_"):
                had, option = stored["search"].get(name), f"--{name.replace('_', '-')}"
                if had is None:
                    where += f" It was begun without {name}: leave out {option}, and {name} in Search(...)."
                    continue
                said = had if isinstance(had, str) else format(had, "g")
                where += f" Its {name} was {said}: give it with {option}, or in Search({name}=...)."
        raise StudyError(
            f"The study in {directory.absolute()} was created with other inputs; these differ: "
            f"{', '.join(fields)}. Its trials would not be comparable with new ones.{where} Restore what "
            "changed, or give this run another --dir."
        )


def _require_same_students(
    study: optuna.Study, url: str | None, directory: Path, students: str | None
) -> None:
    """A study's students lie in one place, which all of its workers see: a bucket, or a directory, under
    whatever path.

    Raises:
        StudyError: this is another one.
    """
    known = study.user_attrs.get("students", {})
    where = f"The study {study.study_name!r} in {shown(url, directory)} keeps its students in"
    kept = known.get("url") or known.get("directory") or str(directory / STUDENTS)
    if "url" in known or students is not None:
        if students is not None and students.rstrip("/") != known.get("url"):
            if known or study.get_trials(deepcopy=False):
                raise StudyError(
                    f"{where} {kept}, not in {students}. Leave out --students, or rename the task for a "
                    "study of its own."
                )
            study.set_user_attr("students", {"url": students.rstrip("/")})
        return
    if url is None:
        return
    file = directory / MARK
    mark = file.read_text().strip() if file.is_file() else ""
    if known and known.get("mark") != mark:
        raise StudyError(
            f"{where} {kept}, and {directory.absolute()} is not that directory. Give it with --dir; on "
            "another machine it has to be on a file system that both share. Or keep students in a bucket "
            "(--students), or rename the task for a study of its own."
        )
    if not known:
        if not mark:
            mark = uuid.uuid4().hex
            write_durably(file, mark.encode())
        named = f"{socket.gethostname()}:{directory.resolve()}"
        study.set_user_attr("students", {"mark": mark, "directory": named})


def place_of_students(study: optuna.Study, directory: Path) -> Path | str:
    """Where the students of a study lie: the URL of a bucket, or a directory."""
    url = study.user_attrs.get("students", {}).get("url")
    return str(url) if url else directory / STUDENTS


def require_same_format(directory: Path, stored: Mapping[str, Any], current: int) -> None:
    """What is stored of teacher and data can be compared with what this version makes of them.

    Raises:
        StudyError: another version made it.
    """
    made = stored.get("format", 0)
    if made != current:
        raise StudyError(
            f"The study in {directory.absolute()} was made by {'an older' if made < current else 'a newer'} "
            f"version of spansearch (format {made}, here {current}): whether teacher, data and settings are "
            "still the same cannot be told. Use that version for it, or give this run another --dir."
        )


def require_same_teacher(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """The teacher behaves as when the study was created, up to what another machine's rounding explains.

    Its weights can be the same and its code, the score or the mask another: that shows here.

    Raises:
        StudyError: lists what differs, with both values.
    """
    changed = []
    for name in sorted(set(stored) & set(current)):
        old, new = stored[name], current[name]
        both_numbers = isinstance(old, float) and isinstance(new, float)
        if not (math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-6) if both_numbers else old == new):
            changed.append(f"{name} ({old} then, {new} now)")
    if changed:
        raise StudyError(
            f"The teacher or how it is scored changed since the study was created: {', '.join(changed)}. Its "
            "trials would not be comparable with new ones. Restore what changed, or give this run another "
            "--dir."
        )


def differences(stored: Any, current: Any, name: str = "") -> list[str]:
    """Names of the fields in which two fingerprints differ, dotted: ``search.fit.steps``."""
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        fields = sorted(set(stored) | set(current))
        prefix = f"{name}." if name else ""
        return [d for f in fields for d in differences(stored.get(f), current.get(f), prefix + f)]
    return [] if stored == current else [name]


def _other(url: str | None, directory: Path, names: list[str]) -> str:
    where = shown(url, directory)
    return f"{where} holds another study: {', '.join(names)}." if names else f"{where} holds no study."
