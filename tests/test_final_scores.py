"""Scores on the test split: when they have an interval, and what it is."""

from typing import Any

import tasks
import torch

from spansearch.evaluate import Evaluator
from spansearch.final_scores import group_scores, score_on_test


def scored(score: Any, model: Any) -> dict[str, Any]:
    teacher = tasks.teacher("mlp")
    evaluator = Evaluator(tasks.make(score=score), teacher, "test")
    return score_on_test(evaluator, model, group_scores(evaluator, teacher), 0)


def test_the_interval_is_that_of_a_mean_and_absent_for_other_scores() -> None:
    weak = tasks.mlp().eval()
    found = scored(tasks.accuracy, weak)
    low, high = found["ci95"]
    assert low < found["score_drop"] < high and high - low < 0.6
    assert found == scored(tasks.accuracy, weak)
    assert scored(tasks.accuracy, tasks.teacher("mlp"))["ci95"] == [0.0, 0.0]

    def squared(model: Any, batches: Any) -> float:
        return tasks.accuracy(model, batches) ** 2

    assert scored(squared, weak)["ci95"] is None

    def shifted(model: Any, batches: Any) -> float:  # a mean for the teacher only
        return tasks.accuracy(model, batches) ** (1 if model is weak else 2)

    assert scored(shifted, weak)["ci95"] is None

    def whole_only(model: Any, batches: Any) -> float:
        batches = list(batches)
        if sum(len(labels) for _, labels in batches) < 50:
            raise ValueError("Only one class present: the score is not defined")
        return tasks.accuracy(model, batches)

    found = scored(whole_only, weak)
    assert found["ci95"] is None and found["score"] == tasks.accuracy(weak, tasks.split(tasks.blobs(96, 4)))


def test_with_a_mask_the_mean_over_positions_has_an_interval() -> None:
    """Positions are the 8 features here: of every example another number counts."""

    def counted(batch: Any) -> torch.Tensor:
        return torch.arange(8) < 1 + batch[1][:, None] * 3

    def by_position(model: Any, batches: Any) -> float:
        right = counts = 0.0
        for x, labels in batches:
            count = counted((x, labels)).sum(1)
            right += float(((model(x).argmax(1) == labels) * count).sum())
            counts += float(count.sum())
        return right / counts

    weak, teacher = tasks.mlp().eval(), tasks.teacher("mlp")
    for mask, known in ((counted, True), (None, False)):
        evaluator = Evaluator(tasks.make(score=by_position, mask=mask, divergence="squared"), teacher, "test")
        found = score_on_test(evaluator, weak, group_scores(evaluator, teacher), 0)
        assert (found["ci95"] is not None) == known
        assert not known or found["ci95"][0] < found["score_drop"] < found["ci95"][1]
