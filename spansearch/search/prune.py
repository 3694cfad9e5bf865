"""The ridge rule: a proposal whose span's best linear student is hopeless is not fitted. And its audit.

Optuna's own pruners do not exist for several objectives. Learning curves by themselves mislead here: students
from scratch start above the linear map and overtake it. So a fit that is under way is judged by the same
rule: the linear student's divergence, scaled by how the fit's error compares with the linear student's by
then, and ratios learnt from fits at the same point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from spansearch.recipe import Splice

FIRST_RHO = 0.2
ENOUGH = 10  # ratios seen before the lowest of them is trusted
LARGEST_RHO = 0.5  # however poor the students so far were: the next family or width may do better


@dataclass(frozen=True)
class Decision:
    """Why a proposal was not fitted, with its bound.

    Attributes:
        linear: divergence of the span's best linear student, spliced, and healed where a student would be; in
            a fit that is under way scaled by how its error compares with the linear student's.
        rho: how much better than that a student may turn out.
        bound: rho x linear: the divergence the proposal can hope for.
        flops, best: the proposal's flops, and the lowest divergence known at no more flops.
        after: the share of the fit after which this was decided.
    """

    linear: float
    rho: float
    bound: float
    flops: int
    best: float
    after: float = 0.0

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        rule, what = "ridge rule", f"the linear student's {self.linear:.3g}"
        if self.after:
            rule, what = f"given up after {self.after:.0%} of its fit", f"{self.linear:.3g} as its error is"
        at_best = f"at best {self.bound:.3g} ({self.rho:.2g} x {what})"
        return f"{rule}: {at_best}, {self.best:.3g} is known at no more flops"


class RidgeRule:
    """Prunes where a known model is no costlier and better than rho x the span's best linear student.

    rho is learnt: the lowest ratio of a student's divergence to that of its span's best linear one, neither
    healed, over the students fitted so far, at most one half; until ten are known at most ``first``. What is
    on the front is what did better than others: a quantile above the lowest loses it.
    """

    def __init__(self, ratios: Iterable[float] = (), first: float = FIRST_RHO) -> None:
        self.ratios, self.first = list(ratios), first

    @property
    def rho(self) -> float:
        return min([self.first if len(self.ratios) < ENOUGH else LARGEST_RHO, *self.ratios])

    def learn(self, divergence: float, linear: float) -> None:
        """A student was fitted and measured in a span whose best linear student is known."""
        if linear > 0:
            self.ratios.append(divergence / linear)

    def decide(self, flops: int, linear: float, known: Sequence[tuple[int, float]]) -> Decision | None:
        """A Decision where the proposal cannot reach the front, else None.

        Args:
            flops: of the proposed spliced model.
            linear: divergence of its span's best linear student, healed where it would be.
            known: (flops, divergence) of the models measured so far.
        """
        best = min((divergence for cost, divergence in known if cost <= flops), default=None)
        bound = self.rho * linear
        if best is None or best >= bound:
            return None
        return Decision(linear, self.rho, bound, flops, best)


def audited(splice: Splice, seed: int, share: float) -> bool:
    """Is this proposal run even if the rule prunes it? About ``share`` of all are, whenever they come up."""
    words = [seed, *str(splice).encode()]
    return bool(np.random.default_rng(words).random() < share)
