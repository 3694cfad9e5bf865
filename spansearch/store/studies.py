"""The Optuna study in a storage: found, created, or refused because it is another one."""

from __future__ import annotations

import math
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from spansearch.errors import StudyError
from spansearch.store.database import DATABASE, open_storage, shown
from spansearch.store.source import run_beside

OBJECTIVES = 2  # the loss, and a cost


class NoStudyError(StudyError):
    """There is no study of this name yet."""


def find_study(url: str | None, directory: Path, name: str, file: Path | None = None) -> optuna.Study:
    """The study of a run.

    Args:
        file: the study file; a run beside it is named where there is none in the directory.

    Raises:
        NoStudyError: there is none of this name. StudyError: the storage cannot be used.
    """
    directory = directory.absolute()
    start = f"Start one with: spansearch run STUDY --dir {directory}"
    if url is None and not (directory / DATABASE).exists():
        beside = run_beside(file, name, directory) if file is not None else ""
        raise NoStudyError(
            f"No study in {directory}.{beside} {start} (or, if it was run with --storage, give that again)."
        )
    storage = open_storage(url, directory)
    names = [study.study_name for study in storage.get_all_studies()]
    if name not in names:
        raise NoStudyError(f"{_other(url, directory, names)} {start}")
    return optuna.load_study(study_name=name, storage=storage)


def open_study(url: str | None, directory: Path, name: str, fingerprint: Mapping[str, Any]) -> optuna.Study:
    """The study of a run, created where there is none.

    Args:
        fingerprint: everything that makes trials comparable, as plain data; kept with the study.

    Raises:
        StudyError: the directory holds another study, the study was created with another fingerprint (lists
            the fields that differ), or the storage cannot be used.
    """
    storage = open_storage(url, directory)
    names = [study.study_name for study in storage.get_all_studies()]
    if name in names:
        study = optuna.load_study(study_name=name, storage=storage)
    elif names and url is None:
        raise StudyError(f"{_other(url, directory, names)} Give this one another --dir.")
    else:
        study = optuna.create_study(study_name=name, storage=storage, directions=["minimize"] * OBJECTIVES)
    if url is not None:  # in a shared database: students lie in one directory, and one process runs the study
        home = f"{socket.gethostname()}:{directory.resolve()}"
        if study.user_attrs.get("directory", home) != home:
            raise StudyError(
                f"The study {name!r} in {shown(url, directory)} is run in {study.user_attrs['directory']}. "
                "Its students are there. Continue it there, or rename the task for a study of its own."
            )
        study.set_user_attr("directory", home)
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
                said = "not set: leave out"
                if had is not None:
                    said = f"{had if isinstance(had, str) else format(had, 'g')}: give it with"
                where += f" Its {name} was {said} {option}, or in Search({name}=...)."
        raise StudyError(
            f"The study in {directory.absolute()} was created with other inputs; these differ: "
            f"{', '.join(fields)}. Its trials would not be comparable with new ones.{where} Restore what "
            "changed, or give this run another --dir."
        )
    return study


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
