"""Where a study lives: Optuna's storage and the files of its students."""

from spansearch.store.database import Locked, open_storage, run_lock
from spansearch.store.files import StudentFiles, write_durably

__all__ = ["Locked", "StudentFiles", "open_storage", "run_lock", "write_durably"]
