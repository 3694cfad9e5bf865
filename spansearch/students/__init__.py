"""Families of students; importing this package registers the built-in ones."""

from spansearch.students import attention, conv, identity, lowrank, mlp, ridge
from spansearch.students.base import (
    Family,
    Fitted,
    Init,
    attends,
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
    "attends",
    "attention",
    "check_width",
    "conv",
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
