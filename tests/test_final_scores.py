"""Scores on the test split: when they have an interval, and what it is."""

from typing import Any

import tasks
import torch

from spansearch.evaluate import Evaluator
from spansearch.final_scores import DIGITS, group_scores, score_on_test, with_neighbours


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


def test_neighbours_are_told_apart_where_the_same_examples_say_so() -> None:
    """Each alone is as uncertain as the others: what counts is how they differ on the same examples."""
    weights = [8.0] * 40
    easy = [float(k % 9) / 8 for k in range(40)]

    def figures(scores: list[float], over: tuple[int, ...] = (0,)) -> dict[str, Any]:
        return {"score": sum(scores) / 40, "ci95": [0, 1], "groups": scores, "mean_over": list(over)}

    scored = {
        "weights": [weights, weights],
        "teacher": 1.0,
        "3": figures(easy),
        "1": figures([score + 0.02 for score in easy]),  # always a little better
        "7": figures([score + 0.02 + 0.1 * (-1) ** k for k, score in enumerate(easy)]),  # as often worse
        "2": figures([score - 0.3 for score in easy], (1,)),  # a mean of another kind
        "4": {"score": 0.1, "ci95": None, "groups": None, "mean_over": []},
        "5": {"score": 0.1, "ci95": None},  # as older versions kept it
    }
    found = with_neighbours(["3", "1", "7", "2", "4", "5", "6"], scored, 0)
    differs = {number: one["differs_from_cheaper"] for number, one in found.items()}
    assert differs == {"3": None, "1": True, "7": False, "2": None, "4": None, "5": None}
    assert all(one.keys() <= {"score", "ci95", "differs_from_cheaper"} for one in found.values())
    assert "groups" in scored["3"]  # nothing was taken from what is stored


def test_what_is_kept_of_a_member_is_its_score_on_every_group() -> None:
    weak = tasks.mlp().eval()
    found = scored(tasks.accuracy, weak)
    batches = tasks.split(tasks.blobs(96, 4))
    groups = [
        tasks.accuracy(weak, [(x, y)])
        for a, b in batches
        for x, y in zip(a.split(8), b.split(8), strict=True)
    ]
    assert found["groups"] == [float(f"{one:.{DIGITS}g}") for one in groups] and found["mean_over"] == [0]
    found = scored(lambda model, batches: tasks.accuracy(model, batches) ** 2, weak)
    assert found["groups"] is None and found["mean_over"] == []


def test_large_splits_have_larger_groups() -> None:
    task = tasks.make(test=lambda: tasks.split(tasks.blobs(4096, 4), 512))
    teacher = tasks.teacher("mlp")
    groups = group_scores(Evaluator(task, teacher, "test"), teacher)
    assert groups is not None and 200 < len(groups) <= 256
