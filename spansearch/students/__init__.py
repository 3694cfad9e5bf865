"""Families of students; importing this package registers the built-in ones."""

from spansearch.students import conv, identity, lowrank, mlp, ridge
from spansearch.students.base import (
    Family,
    Init,
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
    "check_width",
    "conv",
    "deepest",
    "families",
    "family",
    "fit_student",
    "identity",
    "lowrank",
    "mlp",
    "refusal",
    "register",
    "ridge",
    "student_cost",
]
