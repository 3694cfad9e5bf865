"""Where a study lives: its file, Optuna's storage and the files of its students."""

from spansearch.store.crew import Crew
from spansearch.store.database import database_errors, make_directory, open_storage
from spansearch.store.files import StudentFiles
from spansearch.store.leases import Lease, leases_of, seems_alive
from spansearch.store.locks import NotLockedError, StudyLock
from spansearch.store.places import place_of, write_durably
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
    place_of_students,
    require_same_format,
    require_same_teacher,
)

__all__ = [
    "MODULE_PREFIX",
    "Crew",
    "Lease",
    "NoStudyError",
    "NotLockedError",
    "Source",
    "StudentFiles",
    "StudyLock",
    "database_errors",
    "find_study",
    "leases_of",
    "make_directory",
    "open_storage",
    "open_study",
    "place_of",
    "place_of_students",
    "read_study",
    "remember_source",
    "require_same_format",
    "require_same_teacher",
    "seems_alive",
    "source_of",
    "write_durably",
]
