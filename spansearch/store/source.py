"""Study files: read, and remembered in a run's directory so that the directory alone names its study."""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from spansearch.errors import StudyError, TaskError
from spansearch.store.files import write_durably
from spansearch.task import Task

ABOUT = "study.json"
MODULE_PREFIX = "spansearch_study_"
"""Study files become modules of this name and their own."""


def remember_source(directory: Path, file: Path) -> None:
    """Write down the study file of a run."""
    about = json.dumps({"file": str(file.resolve())}).encode()
    path = directory / ABOUT
    if not path.is_file() or path.read_bytes() != about:
        write_durably(path, about)


def source_of(directory: Path) -> Path:
    """The study file a directory was run from; StudyError where it is unknown or gone."""
    directory = directory.absolute()
    instead = f"STUDY --dir {directory}"
    try:
        path = Path(json.loads((directory / ABOUT).read_bytes())["file"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(
            f"{directory} does not say which study file it was run from ({ABOUT} is missing or damaged). "
            f"Give the file and the directory instead: {instead}"
        ) from error
    if not path.is_file():
        raise StudyError(
            f"{directory} was run from {path}, which is not there any more; teacher and data come from "
            f"it. Restore it, or give its new place and the directory instead: {instead}"
        )
    return path


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
    spec = importlib.util.spec_from_file_location(f"{MODULE_PREFIX}{path.stem}", path)
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
