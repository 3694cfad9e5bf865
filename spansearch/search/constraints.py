"""Constraints: what a model must not exceed to be of use to somebody. They are judged on validation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spansearch.errors import TaskError
from spansearch.evaluate import Measures

NAMES = ("max_score_drop", "max_flops", "max_params", "max_latency")
MEASURES = {
    "max_score_drop": "score_drop",
    "max_flops": "flops_ratio",
    "max_params": "params_ratio",
    "max_latency": "latency_ratio",
}
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}
UNMEASURED = 1.0  # as bad as a model of twice the teacher's cost: nothing says that it is feasible
SLACK = 1e-9  # 0.95 - 0.94 is a drop of 0.01


def amount(value: Any, name: str) -> float:
    """What max_flops or max_params means: up to 1 a share of the teacher's, above 1 a number.

    Args:
        value: a number, or text: 0.5, 50%, 2e6, 13.7M.
        name: of the setting, for messages.

    Raises:
        TaskError: it is neither.
    """
    found = math.nan
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            found = float(value.strip()[:-1]) / 100
            found = found if found <= 1 else math.nan  # not to be read as a number of flops
        elif isinstance(value, str) and value.strip()[-1:] in PREFIXES:
            found = float(value.strip()[:-1]) * PREFIXES[value.strip()[-1]]
        elif not isinstance(value, bool):
            found = float(value)
    except (TypeError, ValueError):
        pass
    if not 0 < found < math.inf:
        raise TaskError(
            f"Search: {name} must be a share of the teacher's (0.5 or 50%) or a number above 1 (2e6, 13.7M), "
            f"got {value!r}."
        )
    return found


def drop(value: Any) -> float:
    """What max_score_drop means, in units of the score; TaskError where it is no number from 0 on."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise TaskError(
            "Search: max_score_drop must be a number of at least 0 in units of the score (a drop below 0 "
            f"counts as none), got {value!r}."
        )
    return found


def latency(value: Any) -> float | str:
    """What max_latency means: a share of the teacher's up to 1, or a time, as text in seconds: ``0.012s``.

    Args:
        value: 0.6, "60%", "12ms", "0.8s", "500us".

    Raises:
        TaskError: it is neither.
    """
    found = math.nan
    text = value.strip() if isinstance(value, str) else ""
    timed = re.fullmatch(r"(.*?)\s*(s|ms|us)", text)
    try:
        if timed:
            found = float(timed[1]) * UNITS[timed[2]]
        elif text.endswith("%"):
            found = float(text[:-1]) / 100
        elif not isinstance(value, bool):
            found = float(value)
    except (TypeError, ValueError):
        pass
    if not 0 < found < math.inf or (not timed and found > 1):
        raise TaskError(
            "Search: max_latency must be a share of the teacher's (0.6 or 60%) or a time for a batch with "
            f"its unit (12ms, 0.8s), got {value!r}."
        )
    return f"{found:.12g}s" if timed else found


@dataclass(frozen=True)
class Constraints:
    """What models of a study must not exceed.

    Attributes:
        limits: by name of the setting: a score drop, or a share of the teacher's flops, parameters or
            latency. One that was given as a time is the share it was of the teacher's when the study began:
            machines get faster and slower, and both models with them.
        scale: score drops are divided by it to be compared with such shares.
    """

    limits: Mapping[str, float]
    scale: float = 1.0

    @classmethod
    def of(cls, settings: Mapping[str, Any], teacher: Mapping[str, Any]) -> Constraints:
        """Those of a study.

        Args:
            settings: of its search, as plain data (Search.fingerprint).
            teacher: its flops, params and score, and latency_s where models are timed, as the study keeps
                them.
        """
        limits: dict[str, float] = {}
        for name in NAMES:
            limit = settings.get(name)
            if isinstance(limit, str):
                limits[name] = float(limit.removesuffix("s")) / teacher["latency_s"]
            elif limit is not None:
                counted = name != "max_score_drop" and limit > 1
                limits[name] = limit / max(1, teacher[name.removeprefix("max_")]) if counted else limit
        return cls(limits, abs(float(teacher.get("score", 1.0))) or 1.0)

    @property
    def flops(self) -> float:
        """The largest share of the teacher's flops."""
        return min(1.0, self.limits.get("max_flops", 1.0))

    def exceeded(self, measures: Measures) -> dict[str, float]:
        """The limits that a model breaks, and by how much, in the units of ``limits``."""
        return {name: by for name, by in self._beyond(measures).items() if by > SLACK}

    def fulfilled(self, measures: Measures) -> bool:
        return not self.exceeded(measures)

    def values(self, measures: Measures | None) -> dict[str, float]:
        """What a sampler is told: one value for every constraint, above 0 where it is broken.

        Args:
            measures: None for a model that was not measured.
        """
        if measures is None:
            return dict.fromkeys(self.limits, UNMEASURED)
        return {
            name: (by if by > SLACK else min(0.0, by)) / (self.scale if name == "max_score_drop" else 1.0)
            for name, by in self._beyond(measures).items()
        }

    def violation(self, measures: Measures) -> float:
        """How far a model is from fulfilling all: 0 where it does."""
        return sum(max(0.0, value) for value in self.values(measures).values())

    def _beyond(self, measures: Measures) -> dict[str, float]:
        """By how much a model exceeds each limit, below 0 where it keeps to it; UNMEASURED where that is not
        known."""
        found = {name: getattr(measures, MEASURES[name]) for name in self.limits}
        return {
            name: UNMEASURED if found[name] is None else found[name] - limit
            for name, limit in self.limits.items()
        }
