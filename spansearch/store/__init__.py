"""Where a study lives: its file, Optuna's storage and the files of its students."""

from spansearch.store.database import LockedError, database_errors, open_storage, run_lock
from spansearch.store.files import StudentFiles, write_durably
from spansearch.store.source import (
    MODULE_PREFIX,
    Source,
    read_study,
    remember_source,
    source_of,
)
from spansearch.store.studies import (
    NoStudyError,
    find_study,
    open_study,
    require_same_format,
    require_same_teacher,
)

__all__ = [
    "MODULE_PREFIX",
    "LockedError",
    "NoStudyError",
    "Source",
    "StudentFiles",
    "database_errors",
    "find_study",
    "open_storage",
    "open_study",
    "read_study",
    "remember_source",
    "require_same_format",
    "require_same_teacher",
    "run_lock",
    "source_of",
    "write_durably",
]
