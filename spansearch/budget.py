"""What a study may take: trials, time in all, time for one trial."""

from __future__ import annotations

from dataclasses import dataclass

from spansearch.errors import StudyError


@dataclass(frozen=True)
class Budget:
    """Whichever comes first ends the study; all count over all runs of it.

    Attributes:
        trials: finished ones.
        timeout: seconds of work, by a clock on the wall; None: as long as it takes.
        max_trial_seconds: that one trial may take, or it fails; None: as long as it takes.

    Raises:
        StudyError: nothing could be done within it.
    """

    trials: int
    timeout: float | None = None
    max_trial_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise StudyError(f"trials must be at least 1, got {self.trials}.")
        if self.timeout is not None and not self.timeout > 0:
            raise StudyError(f"timeout must be above 0 seconds, got {self.timeout}.")
        if self.max_trial_seconds is not None and not self.max_trial_seconds > 0:
            raise StudyError(f"max_trial_seconds must be above 0, got {self.max_trial_seconds}.")
