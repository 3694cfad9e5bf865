"""Fits the students of one study: each with its own seed, each learning rate found once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from spansearch.compose import Composition, Part
from spansearch.errors import SaveError, StudyError, is_out_of_memory
from spansearch.fit import FitSettings, GiveUp, find_rate
from spansearch.recipe import Splice
from spansearch.search import Search
from spansearch.search.library import Library
from spansearch.spans import Span
from spansearch.store import StudentFiles
from spansearch.students import Fitted, fit_student
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

KEPT = 16  # students fitted for compositions, in case the next one asks for the same
LEAST_BATCH = 4  # examples
T = TypeVar("T")
HARDLY = 0.8  # held-out error of a fit that has learnt next to nothing; 1 is the mean


class Rates:
    """Learning rates, each found once by a range test and kept with the study."""

    def __init__(self, known: dict[str, float]) -> None:
        self.known = dict(known)

    def get(self, name: str, span: Span, init: str, search: Callable[[], float]) -> float:
        """Of students, by family, start and layout."""
        return self.of(f"{name} {init} {span.stop.layout}", search)

    def of(self, key: str, search: Callable[[], float]) -> float:
        if key not in self.known:
            self.known[key] = search()
        return self.known[key]


class OneRate(Rates):
    """The learning rate of a fit that is repeated."""

    def __init__(self, rate: float) -> None:
        super().__init__({})
        self.rate = rate

    def of(self, key: str, search: Callable[[], float]) -> float:
        return self.rate


def with_room(fit: FitSettings, made: Callable[[FitSettings], T]) -> T:
    """What is made in batches; where there is too little memory for them, in smaller ones."""
    while True:
        try:
            return made(fit)
        except Exception as error:
            if not is_out_of_memory(error) or fit.batch_size <= LEAST_BATCH:
                raise
            fit = replace(fit, batch_size=max(LEAST_BATCH, fit.batch_size // 2))
            log.warning("too little memory: tried again in batches of %d", fit.batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Fitter:
    """Fits students.

    Args:
        bench: teacher, data, spans.
        settings: the search's.
        files: where students are kept.
        rates: learning rates known so far.
    """

    def __init__(self, bench: Workbench, settings: Search, files: StudentFiles, rates: Rates) -> None:
        self.bench, self.settings, self.files, self.rates = bench, settings, files, rates
        self._fitted: dict[Splice, tuple[Splice, nn.Module]] = {}  # for compositions; the latest of them

    def alone(self, one: Splice, span: Span, library: Library) -> tuple[Splice, nn.Module]:
        """A student by itself, and what it grew to: as it was fitted before, where that is still there."""
        known = library.get(one)
        if known is not None and known.entry is not None:
            part = Part(span, one.family, one.size, known.depth)
            try:
                kept = Composition.restored([part], self.files.load(known.entry), self.bench.teacher)
            except SaveError:
                raise
            except (StudyError, KeyError, RuntimeError) as error:
                log.warning("%s is fitted again: %s", one, error)
            else:
                return replace(one, depth=known.depth), kept.students[span].to(self.bench.device)
        if one not in self._fitted:
            fitted = self.fit(one, span)
            self._fitted[one] = replace(one, depth=fitted.depth), fitted.student
            if len(self._fitted) > KEPT:
                self._fitted.pop(next(iter(self._fitted)))
        return self._fitted[one]

    def fit(self, one: Splice, span: Span, give_up: GiveUp | None = None) -> Fitted:
        """A student on what the teacher has at both ends of its span.

        Args:
            give_up: as of ``fit_student``. Not asked where a fit has hardly learnt anything by then: that may
                be the rate's fault.
        """
        return with_room(self.settings.fit, lambda fit: self._fit(one, span, give_up, fit))

    def _fit(self, one: Splice, span: Span, give_up: GiveUp | None, fit: FitSettings) -> Fitted:
        evidence, seed = self.bench.evidence, self.seed_of(one)
        tested = []

        def test(start: Callable[[], nn.Module]) -> float:
            tested.append(find_rate(start, evidence.data(span), fit, seed))
            return tested[-1]

        def rate(start: Callable[[], nn.Module]) -> float:
            return self.rates.get(one.family, span, one.init, partial(test, start))

        student = partial(fit_student, one.family, span, one.size, one.init, evidence, fit)
        watch = None if give_up is None else lambda error: error < HARDLY and give_up(error)
        fitted = student(rate, seed, watch)
        if fitted.report is None or tested or fitted.held_out_error < HARDLY:
            return fitted
        # hardly better than the mean: a rate found for another size of student may be none for this one
        again = student(test, seed)
        return again if again.held_out_error < fitted.held_out_error else fitted

    def seed_of(self, one: Splice) -> int:
        """The seed of a splice's fit: the same splice is the same student whenever it comes up."""
        words = [self.settings.seed, *str(one).encode()]
        return int(np.random.default_rng(words).integers(2**31))
