"""Families of students; importing this package registers the built-in ones."""

from spansearch.students import (
    attention,
    conv,
    identity,
    lowrank,
    mlp,
    random_features,
    ridge,
    separable,
    thin,
    truncated,
)
from spansearch.students.base import (
    Family,
    Init,
    attends,
    check_width,
    deepest,
    families,
    family,
    refusal,
    register,
    student_cost,
)
from spansearch.students.fitting import Fitted, Growth, fit_student

__all__ = [
    "Family",
    "Fitted",
    "Growth",
    "Init",
    "attends",
    "attention",
    "check_width",
    "conv",
    "deepest",
    "families",
    "family",
    "fit_student",
    "identity",
    "lowrank",
    "mlp",
    "random_features",
    "refusal",
    "register",
    "ridge",
    "separable",
    "student_cost",
    "thin",
    "truncated",
]
