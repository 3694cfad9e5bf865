"""What a study searches, and how."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from spansearch.errors import FamilyError, TaskError
from spansearch.fit import FitSettings
from spansearch.search.constraints import NAMES, amount, drop, latency
from spansearch.search.inner_samplers import SAMPLERS, Sampler
from spansearch.students import check_width, family

FAMILIES = (
    "identity",
    "ridge",
    "lowrank",
    "separable",
    "random_features",
    "truncated",
    "thin",
    "mlp",
    "conv",
    "attention",
)
Cost = Literal["flops", "params", "latency"]
COSTS: tuple[Cost, ...] = ("flops", "params", "latency")


@dataclass(frozen=True)
class Search:
    """Settings of a search. A study is refused when they differ from those it was created with.

    Attributes:
        families: names of the families tried, where they fit a span; the list cannot grow in an existing
            study.
        widths: smallest and largest width tried, in (0, 1].
        resolution: share of the teacher's flops that must lie between two neighbouring cut points.
        nested: search inside residual branches as well.
        include, exclude: patterns of module names (``layer?``, ``*.mlp``), as named_modules() has them: where
            students may go, and where none may. Weights elsewhere are still corrected: by healing, by
            polishing, and between layers that are thinned out.
        level: cut points lie between modules whose names have at most so many parts (2: ``layer1.0``, not
            ``layer1.0.conv1``); None: wherever they may.
        fit: how students are fitted by gradient.
        held_out: share of the calibration examples kept apart from fitting.
        seed: every random choice follows from it.
        seeds: at most so many closed-form students of the predicted front are tried first.
        compose: try splices inside compositions of several as well.
        healing: correct the layers behind splices in closed form.
        polish: distil members of the front, and keep what is better on validation.
        polish_steps: optimiser steps at most of each; batch_size and patience are those of fit.
        audit: share of the pruned proposals that are run anyway.
        sampler: what proposes beside the seeds and the predicted best: ``tpe``, ``nsga2``, ``gp`` (Gaussian
            processes), ``random``.
        max_score_drop: models should not lose more, in units of the score, on validation.
        max_flops, max_params: nor cost more: up to 1 (or "50%") a share of the teacher's, above a number.
        max_latency: nor take longer for a batch: a share of the teacher's (0.6 or "60%") or a time ("12ms").
        cost: what is to become low beside the score drop: ``flops``, ``params`` or ``latency``.
        latency_batch: examples in the batch that latency is measured on, e.g. 1; None takes validation's
            first batch as it is.
        memory_budget: bytes of recorded activations in memory, at most half of it, and of the matrices of
            screening; more activations go to files in the run's directory. Up to an eighth more is for
            activations of validation, which measuring starts from.
        dtype: in which activations are stored.

    With cost="latency" or max_latency the model of every trial is timed beside the teacher, otherwise none
    is. Times vary, and what is proposed follows from them: such a study is not repeated bit for bit, and one
    that was stopped makes other trials than one that was not.

    Raises:
        TaskError, FamilyError: at once, where a setting is out of its range.
    """

    families: tuple[str, ...] = FAMILIES
    widths: tuple[float, float] = (1 / 32, 1.0)
    resolution: float = 0.02
    nested: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    level: int | None = None
    fit: FitSettings = field(default_factory=FitSettings)
    held_out: float = 0.25
    seed: int = 0
    seeds: int = 16
    compose: bool = True
    healing: bool = True
    polish: bool = True
    polish_steps: int = 200
    audit: float = 0.05
    sampler: Sampler = "tpe"
    max_score_drop: float | None = None
    max_flops: float | str | None = None
    max_params: float | str | None = None
    max_latency: float | str | None = None
    cost: Cost = "flops"
    latency_batch: int | None = None
    memory_budget: int = 4 << 30
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "families", tuple(self.families))
        for name in ("include", "exclude"):
            object.__setattr__(self, name, patterns(getattr(self, name), name))
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.families:
            raise FamilyError("Search: families is empty; name at least one, e.g. ('ridge', 'conv').")
        for name in self.families:
            family(name)
        if len(self.widths) != 2:
            raise FamilyError(f"Search: widths must be (smallest, largest), got {self.widths}.")
        for width in self.widths:
            check_width(width)
        if self.widths[0] > self.widths[1]:
            raise FamilyError(f"Search: widths must be (smallest, largest), got {self.widths}.")
        for name, low, high in (("resolution", 0.0, 1.0), ("held_out", 0.0, 1.0), ("audit", -1e-9, 1.0)):
            value = getattr(self, name)
            if not low < value < high:
                raise TaskError(
                    f"Search: {name} must lie between {max(low, 0.0):g} and {high:g}, got {value}."
                )
        for name, least in (("seed", 0), ("seeds", 0), ("memory_budget", 1), ("polish_steps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise TaskError(f"Search: {name} must be a whole number of at least {least}, got {value!r}.")
        if self.level is not None and (not isinstance(self.level, int) or self.level < 1):
            raise TaskError(f"Search: level must be a whole number of at least 1, got {self.level!r}.")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise TaskError(f"Search: dtype must be float32, float16 or bfloat16, got {self.dtype!r}.")
        if self.sampler not in SAMPLERS:
            raise TaskError(f"Search: sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}.")
        SAMPLERS[self.sampler](0)  # says what is not installed, before anything is trained
        if self.max_score_drop is not None:
            object.__setattr__(self, "max_score_drop", drop(self.max_score_drop))
        for name in ("max_flops", "max_params"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, amount(getattr(self, name), name))
        if self.max_latency is not None:
            object.__setattr__(self, "max_latency", latency(self.max_latency))
        if self.cost not in COSTS:
            raise TaskError(f"Search: cost must be one of {', '.join(COSTS)}, got {self.cost!r}.")
        batch = self.latency_batch
        if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
            raise TaskError(
                f"Search: latency_batch must be a whole number of at least 1, or None, got {batch!r}."
            )

    @property
    def timed(self) -> bool:
        """Is the latency of models measured?"""
        return self.cost == "latency" or self.max_latency is not None

    @property
    def limits(self) -> dict[str, float | str]:
        """The constraints that are given, by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    @property
    def changes(self) -> dict[str, Any]:
        """What a command line may have given in place of the study file: constraints, where students go."""
        where = {"include": list(self.include), "exclude": list(self.exclude), "level": self.level}
        return {**self.limits, **{name: value for name, value in where.items() if value}}

    def fingerprint(self) -> dict[str, Any]:
        """The settings that results depend on, as plain data: what it is after JSON as well.

        Constraints are among them. They steer what is tried, Optuna keeps with every trial by how much it
        broke them, for good, and a study stopped and resumed is to make the trials of one that was not. A
        run's directory remembers them, so that resuming needs no more thought than with a seed.
        """
        fields = asdict(self)
        del fields["memory_budget"]  # where activations lie does not change them
        return json.loads(json.dumps(fields))


def patterns(given: Any, name: str) -> tuple[str, ...]:
    """One pattern, or several."""
    some = (given,) if isinstance(given, str) else tuple(given)
    for pattern in some:
        if not isinstance(pattern, str) or not pattern:
            raise TaskError(f"Search: {name} must be patterns of module names, got {pattern!r}.")
    return some
