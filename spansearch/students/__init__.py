"""Families of students; importing this package registers the built-in ones."""

from spansearch.students import (
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
    Fitted,
    Init,
    check_width,
    families,
    family,
    fit_student,
    refusal,
    register,
    student_cost,
)

__all__ = [
    "Family",
    "Fitted",
    "Init",
    "check_width",
    "conv",
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
