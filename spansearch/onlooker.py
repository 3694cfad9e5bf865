"""Looks at a study that others run: what they finished, and what they say."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial

from spansearch.assignments import STOP
from spansearch.events import read_events
from spansearch.outcome import Outcome
from spansearch.recipe import Splice
from spansearch.trials import FINISHED, outcome_of

log = logging.getLogger("spansearch")

KEPT = 100  # commands that were stopped
AGAIN = 60.0
"""Seconds in which what several workers say is said once."""


class Onlooker:
    """Tells what is new in a study since the last look.

    Args:
        study: its storage.
        directory: of the run; its log has the messages of workers that see the same directory.
        on_trial: called with (trial number, splice, outcome) for every trial that was finished.
        patiently: calls what reads the storage; may call it again.
    """

    def __init__(
        self,
        study: OptunaStudy,
        directory: Path,
        on_trial: Callable[[int, Splice | None, Outcome], None] | None,
        patiently: Callable[[Callable[[], list[FrozenTrial]]], list[FrozenTrial]] = lambda read: read(),
    ) -> None:
        self.study, self.directory, self.on_trial = study, directory, on_trial
        self.patiently = patiently
        self._known = {trial.number for trial in study.get_trials(deepcopy=False, states=FINISHED)}
        self._place = max((place for place, _ in read_events(directory)), default=0)
        self._said: dict[str, float] = {}

    def look(self) -> int:
        """Show what is new; returns how many trials are finished."""
        self._show_messages()
        finished = self.patiently(lambda: self.study.get_trials(deepcopy=False, states=FINISHED))
        for trial in finished:
            if trial.number not in self._known:
                self._known.add(trial.number)
                if self.on_trial is not None:
                    self.on_trial(trial.number, *outcome_of(trial))
        return len(finished)

    def _show_messages(self) -> None:
        """Those of the workers; what all of them say is said once."""
        for place, event in read_events(self.directory, self._place):
            self._place = place
            text = str(event.get("text", ""))
            now = time.monotonic()
            if event.get("event") == "message" and now - self._said.get(text, -AGAIN) >= AGAIN:
                self._said[text] = now
                level = logging.getLevelNamesMapping().get(str(event.get("level")).upper(), logging.INFO)
                log.log(level, "%s", text)

    def stop(self, command: str) -> None:
        """Ask the workers that a command began to leave; each does when it has finished its trial."""
        asked = self.study.user_attrs.get(STOP, [])
        self.study.set_user_attr(STOP, [*asked, command][-KEPT:])
