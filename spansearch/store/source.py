"""Study files: read, and remembered in a run's directory so that the directory alone names its study."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spansearch.errors import StudyError, TaskError
from spansearch.store.database import DATABASE, without_secrets
from spansearch.store.places import write_durably
from spansearch.task import Task

ABOUT = "study.json"
MODULE_PREFIX = "spansearch_study_"
"""Study files become modules of this name, their own and a hash of their path: two may have one name."""


@dataclass(frozen=True)
class Source:
    """What a run is made of beside its directory: the study file, its seed, its storage where given, and
    what a command line may change about its search: constraints, and where students may go."""

    file: Path
    seed: int | None = None
    storage: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def remember_source(directory: Path, source: Source) -> None:
    """Write down the study file, the seed, the storage, without its password, and what was changed."""
    storage = source.storage and without_secrets(source.storage)
    kept = {
        "file": str(source.file.resolve()),
        "seed": source.seed,
        "storage": storage,
        "changes": dict(source.changes),
    }
    path, about = directory / ABOUT, json.dumps(kept).encode()
    if not path.is_file() or path.read_bytes() != about:
        write_durably(path, about)


def source_of(directory: Path) -> Source:
    """What a directory was run from; StudyError where it is unknown or its study file is gone."""
    directory = directory.absolute()
    instead = f"STUDY --dir {directory} (from Python: Study.open(file, directory={str(directory)!r}))"
    try:
        about = json.loads((directory / ABOUT).read_bytes())
        source = Source(
            Path(about["file"]), about.get("seed"), about.get("storage"), dict(about.get("changes", {}))
        )
    except FileNotFoundError as error:
        if not (directory / DATABASE).exists():
            raise StudyError(
                f"{directory} is not the directory of a run: neither {ABOUT} nor {DATABASE} is in it. Give "
                "the path of a study file, or of a run's directory, by default runs/<task name>."
            ) from error
        raise StudyError(_unknown(directory, "is missing", instead)) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StudyError(_unknown(directory, "is damaged", instead)) from error
    if not source.file.is_file():
        raise StudyError(
            f"{directory} was run from {source.file}, which is not there any more; teacher and data come "
            f"from it. Restore it, or give its new place and the directory instead: {instead}"
        )
    return source


def _unknown(directory: Path, why: str, instead: str) -> str:
    return (
        f"{directory} does not say which study file it was run from ({ABOUT} {why}). Give the file and the "
        f"directory instead: {instead}"
    )


def run_beside(file: Path, name: str, directory: Path) -> str:
    """A sentence about a run beside the study file, for those who look elsewhere; empty without one."""
    beside = file.resolve().parent / "runs" / name
    if beside == directory.resolve() or not any((beside / kept).exists() for kept in (ABOUT, DATABASE)):
        return ""
    return f" There is one beside the study file: give --dir {beside} (from Python: directory=)."


def read_study(path: str | Path) -> tuple[Task, Any]:
    """TASK and SEARCH (or None) of a study file, which is code and is run.

    As with ``python file.py`` its folder comes first in ``sys.path``, so that it can import its neighbours;
    it stays there, as the callables of a task may import when they are called.

    Raises:
        TaskError: the file is missing, fails when run, or has no ``TASK = ss.Task(...)``.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise TaskError(f"No study file at {path}. Give the path of a Python file with TASK = ss.Task(...).")
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"{MODULE_PREFIX}{path.stem}_{place}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file (its name must end in .py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up there
    folder = str(path.resolve().parent)
    if folder not in sys.path[:1]:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        line = _line(error, str(path))
        where = f" at line {line}" if line else ""
        raise TaskError(f"{path} failed{where}: {type(error).__name__}: {error}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        got = "no TASK" if task is None else f"TASK of type {type(task).__name__}"
        raise TaskError(
            f"{path} has {got}. A study file is a Python file with TASK = spansearch.Task(...) at top level."
        )
    return task, getattr(module, "SEARCH", None)


def _line(error: BaseException, file: str) -> int | None:
    """The innermost line of a file that led to an error."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [
        line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file
    ]
    return lines[-1] if lines else None
