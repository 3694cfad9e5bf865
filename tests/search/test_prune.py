"""The ridge rule, decided by hand."""

import pytest

from spansearch.recipe import Splice
from spansearch.search import RidgeRule, audited


def test_it_prunes_exactly_when_a_known_model_is_cheaper_and_better_than_the_bound() -> None:
    rule = RidgeRule()
    assert rule.rho == 0.2
    # bound = 0.2 x 0.5 = 0.1
    assert rule.decide(100, 0.5, []) is None
    assert rule.decide(100, 0.5, [(101, 0.0)]) is None  # costlier
    assert rule.decide(100, 0.5, [(100, 0.1)]) is None  # not better than the bound
    decision = rule.decide(100, 0.5, [(50, 0.3), (100, 0.0999), (101, 0.0)])
    assert decision is not None
    said = {"linear": 0.5, "rho": 0.2, "bound": 0.1, "flops": 100, "best": 0.0999, "after": 0.0}
    assert decision.to_json() == said
    assert "0.1" in str(decision) and "0.0999" in str(decision)


def test_a_perfect_linear_student_is_never_a_reason_to_prune() -> None:
    assert RidgeRule().decide(10, 0.0, [(1, 0.0)]) is None


def test_rho_is_cautious_until_ten_ratios_are_known_and_then_the_lowest_of_them() -> None:
    rule = RidgeRule()
    for ratio in (0.9, 0.5, 0.8, 0.35):
        rule.learn(ratio * 2.0, 2.0)
    assert rule.rho == 0.2
    for ratio in (0.7,) * 5:
        rule.learn(ratio, 1.0)
    assert rule.rho == 0.2  # nine
    rule.learn(1.0, 0.0)  # says nothing
    assert rule.rho == 0.2
    rule.learn(0.6, 1.0)
    assert rule.rho == pytest.approx(0.35)
    rule.learn(0.02, 0.4)
    assert rule.rho == pytest.approx(0.05)
    assert RidgeRule(rule.ratios).rho == rule.rho  # a resumed study knows the same
    assert RidgeRule([0.01]).rho == 0.01  # however few they are
    assert RidgeRule([0.9] * 20).rho == 0.5  # the next family may do better


def test_about_one_in_twenty_is_audited_and_always_the_same() -> None:
    splices = [Splice("a", f"b{i}", "mlp", 1 + i % 7, "scratch") for i in range(2000)]
    chosen = [audited(s, 0, 0.05) for s in splices]
    assert 65 < sum(chosen) < 135
    assert chosen == [audited(s, 0, 0.05) for s in splices]
    assert chosen != [audited(s, 1, 0.05) for s in splices]
    assert not any(audited(s, 0, 0.0) for s in splices)
