"""Which study file a directory was run from, so that the directory alone names it."""

from __future__ import annotations

import json
from pathlib import Path

from spansearch.errors import StudyError
from spansearch.store.files import write_durably

ABOUT = "study.json"


def remember_source(directory: Path, file: Path) -> None:
    """Write down the study file of a run."""
    about = json.dumps({"file": str(file.resolve())}).encode()
    path = directory / ABOUT
    if not path.is_file() or path.read_bytes() != about:
        write_durably(path, about)


def source_of(directory: Path) -> Path:
    """The study file a directory was run from; StudyError where it is unknown or gone."""
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
