"""What the trials of a study taught it so far.

A running study and one that is resumed learn in the same way, from one finished trial after the other: so
both know the same.
"""

from __future__ import annotations

import math
from typing import Any

from spansearch.front import non_dominated
from spansearch.outcome import Outcome
from spansearch.recipe import Recipe, Splice
from spansearch.search import Prospects, RidgeRule, Student
from spansearch.search.library import Item, Library
from spansearch.spans import Spans
from spansearch.students import width_of

Seen = dict[Recipe, tuple[int, Outcome]]
"""By recipe, as asked for, the trial that it was tried in, and what became of it."""


class Memory:
    """What is known after some trials.

    Args:
        found: the teacher's spans, at full resolution.

    Attributes:
        rule: the ridge rule with the ratios seen.
        curves: the same for fits that are under way; what these may still come to nobody knows at first.
        known: (flops, divergence) of the models measured.
        linear: divergence of the best linear student, spliced and not healed, by span name.
        healed: the same, healed, where that was measured.
        prospects: what students may come to.
        library: the students measured by themselves, and what compositions came to.
        seen: what was tried; failed trials may be tried again.
        failed: the recipes of those.
        polished: number of a trial whose model was polished -> what became of it.
        refused: names of the spans that did not survive their replay.
        numbers: of the finished trials.
        in_hand: what other workers have in their hands.
        polishing: parameters of the trials in which others polish.
    """

    def __init__(self, found: Spans) -> None:
        self.found = found
        self.rule = RidgeRule()
        self.curves = RidgeRule(first=0.0)
        self.known: list[tuple[int, float]] = []
        self._front: list[tuple[int, float]] = []
        self._beaten = 0  # so many of the models known were held against the front
        self.linear: dict[str, float] = {}
        self.healed: dict[str, float] = {}
        self.prospects = Prospects(self.linear)
        self.library = Library()
        self.seen: Seen = {}
        self.failed: set[Recipe] = set()
        self.polished: dict[int, Outcome] = {}
        self.refused: list[str] = []
        self.numbers: set[int] = set()
        self.in_hand: set[Recipe] = set()
        self.polishing: list[dict[str, Any]] = []

    @property
    def front(self) -> list[tuple[int, float]]:
        """Of the models known, those that no other one beats in flops and divergence."""
        while self._beaten < len(self.known):
            self._front.append(self.known[self._beaten])
            self._front = [self._front[k] for k in non_dominated(self._front)]
            self._beaten += 1
        return self._front

    def learn(self, number: int, splice: Splice | None, outcome: Outcome) -> None:
        """A trial is finished.

        Args:
            splice: that was asked for; None where its family could not say.
        """
        self.numbers.add(number)
        details = outcome.details
        if "polish" in details:  # teaches nothing of what closed forms come to: neither sums nor ratios
            self.polished[details["polish"]["of"]] = outcome
            return
        if splice is None or "duplicate_of" in details:
            return
        recipe = tuple(one.asked for one in outcome.recipe or (splice,))
        if outcome.state == "failed":
            self.failed.add(recipe)
        else:
            self.seen[recipe] = (number, outcome)
        if details.get("refused_by_replay"):
            self.refused.append(splice.span_name)
        baseline = details.get("linear_divergence")
        if baseline is not None:
            self.linear[splice.span_name] = baseline
        if "linear_healed" in details:
            self.healed[splice.span_name] = details["linear_healed"]
        measures = outcome.measures
        if measures is None:
            return
        self.known.append((measures.flops, measures.divergence))
        predicted = details.get("predicted")
        if predicted is not None:  # a composition
            if predicted["spliced"] is not None:
                self.library.learn(predicted["thinned"], predicted["spliced"], measures.divergence)
            return
        raw = details.get("unhealed", {}).get("divergence", measures.divergence)
        if baseline is not None:
            self.rule.learn(raw, baseline)
            if "expected" in details:
                self.curves.learn(raw, details["expected"])
        elif splice.family == "ridge":
            self.linear.setdefault(splice.span_name, raw)
            if "unhealed" in details:
                self.healed.setdefault(splice.span_name, measures.divergence)
        if "unhealed" in details and min(raw, measures.divergence) > 0:
            self.prospects.healings.append(math.log(measures.divergence / raw))
        saved = (1 - measures.flops_ratio) * self.found.flops
        span, made = self.found[splice.start, splice.stop], outcome.made(splice)
        student = Student(span.name, width_of(splice.family, span, splice.size), raw)
        self.prospects.add(splice.family, student, details.get("fit", {}).get("steps"))
        self.library.add(
            Item(splice.asked, span, saved, measures.divergence, made.depth, details.get("student"))
        )
