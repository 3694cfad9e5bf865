"""One proposal at a time: refused, pruned, fitted, stored, measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch

import spansearch as ss
from spansearch import fitter
from spansearch.compose import Part
from spansearch.evaluate import Measures
from spansearch.fitter import Rates
from spansearch.memory import Memory
from spansearch.outcome import TIE, Outcome, loss
from spansearch.proposal import HEALS, Proposals, rebuild
from spansearch.recipe import Splice
from spansearch.search import RidgeRule, audited
from spansearch.store import StudentFiles
from spansearch.students import refusal


def measures(drop: float, divergence: float) -> Measures:
    return Measures(1 - drop, drop, divergence, 10, 10, 0.1, 0.1)


def made(directory: Path, kind: str = "mlp", **search: Any) -> Proposals:
    study = ss.Study(tasks.make(kind), directory=directory, search=tasks.quick(**search))
    files = StudentFiles(directory / "students")
    memory = Memory(study.bench.found)
    return Proposals(study.bench, study.space, study.search, files, memory, Rates({}))


def carried_out(proposals: Proposals, one: Splice) -> Outcome:
    """As a study does: what comes out is remembered."""
    outcome = proposals.carry_out(one)
    proposals.memory.learn(0, outcome.made(one), outcome)
    return outcome


def splice(proposals: Proposals, family: str, size: int = 0, init: Any = "warm", span: int = -1) -> Splice:
    """A splice in the costliest span, or in another."""
    spans = sorted((s for s in proposals.space.spans if not s.nested), key=lambda s: s.flops)
    return Splice(spans[span].start.name, spans[span].stop.name, family, size, init)


def test_the_divergence_decides_among_equal_scores_only() -> None:
    assert loss(measures(0.1, 5.0)) > loss(measures(0.1, 0.5)) > loss(measures(0.1, 0.0)) == 0.1
    assert loss(measures(0.1, 1e12)) < loss(measures(0.1 + 1.01 * TIE, 0.0))
    assert loss(measures(-0.2, 0.5)) > loss(measures(0.0, 0.4)) >= 0
    assert Outcome("complete", measures(0.1, 0.0)).values() == (0.1, 10.0)
    assert Outcome("pruned").values() is None


def test_the_second_value_told_is_the_cost_that_is_searched_by() -> None:
    timed = Outcome("complete", replace(measures(0.1, 0.0), params=7, latency_s=3.0, latency_ratio=0.5))
    told = [timed.values(cost) for cost in ("flops", "params", "latency")]
    assert told == [(0.1, 10.0), (0.1, 7.0), (0.1, 0.5)]
    with pytest.raises(ss.StudyError, match="latency was not measured"):
        Outcome("complete", measures(0.1, 0.0)).values("latency")


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize(
    ("name", "size", "init"), [("ridge", 0, "warm"), ("lowrank", 2, "warm"), ("mlp", 1, "scratch")]
)
def test_a_proposal_is_measured_stored_and_rebuilt(
    kind: str, name: str, size: int, init: Any, tmp_path: Path
) -> None:
    proposals = made(tmp_path, kind)
    one = splice(proposals, name, size, init)
    outcome = proposals.carry_out(one)
    assert outcome.state == "complete", outcome.details
    model = rebuild(proposals.bench, proposals.files, outcome.recipe, outcome.details["student"])
    assert proposals.bench.validation.measure(model) == outcome.measures
    assert outcome.details["student_params"][0] > 0 and outcome.recipe == (one,)
    announced = proposals._flops(one, proposals.space.span(one))  # what the rule goes by
    assert outcome.measures is not None and outcome.measures.flops == announced
    again = made(tmp_path / "again", kind).carry_out(one)
    assert again.measures == outcome.measures
    assert again.details["student"] == outcome.details["student"]


def test_a_span_that_fails_its_replay_is_refused_with_the_reason(tmp_path: Path, monkeypatch: Any) -> None:
    proposals = made(tmp_path)
    monkeypatch.setattr(proposals.bench, "refusal", lambda span: "bypassed")
    outcome = proposals.carry_out(splice(proposals, "ridge"))
    assert (outcome.state, outcome.details["reason"]) == ("pruned", "bypassed")
    assert outcome.details["refused_by_replay"] is True and outcome.details["seconds"]["fitting"] == 0.0
    assert not (tmp_path / "students").exists()


def test_the_rule_needs_a_cheaper_better_model_and_an_audit_runs_it_anyway(tmp_path: Path) -> None:
    proposals = made(tmp_path, audit=0.05)
    sizes = range(1, 60)
    spans = range(-1, -9, -1)
    family = "mlp"
    candidates = [splice(proposals, family, size, "scratch", span) for span in spans for size in sizes]
    spared = next(s for s in candidates if audited(s, 0, 0.05) and not proposals_refuse(proposals, s))
    condemned = next(s for s in candidates if not audited(s, 0, 0.05) and not proposals_refuse(proposals, s))
    first = carried_out(proposals, condemned)
    assert first.state == "complete" and "rule" not in first.details  # nothing better is known
    assert first.details["linear_divergence"] == proposals.memory.linear[condemned.span_name] > 0
    proposals.memory.known.append((0, 0.0))
    outcome = carried_out(proposals, condemned)
    assert outcome.state == "pruned" and outcome.details["reason"].startswith("ridge rule")
    heals = proposals.settings.healing and proposals.bench.may_heal(proposals.space.span(condemned))
    assert outcome.details["rule"]["bound"] == pytest.approx(
        proposals.memory.rule.rho * outcome.details["linear_divergence"] / (HEALS if heals else 1)
    )
    audit = carried_out(proposals, spared)
    assert audit.state == "complete" and audit.details["audited"] and audit.details["rule"]["best"] == 0.0
    closed = carried_out(proposals, splice(proposals, "ridge", span=-2))
    assert (
        closed.state == "complete" and "rule" not in closed.details
    )  # the linear student itself is never pruned


def test_a_fit_is_given_up_where_its_error_says_that_it_cannot_reach_the_front(tmp_path: Path) -> None:
    proposals = made(tmp_path, audit=0.05, healing=False, fit=ss.FitSettings(steps=40, check_every=5))
    memory = proposals.memory
    span = proposals.space.span(splice(proposals, "mlp", 1, "scratch", -2))
    memory.prospects.errors = {span.name: 0.1}
    candidates = [splice(proposals, "mlp", size, "warm", -2) for size in range(1, 60)]
    some = [one for one in candidates if not proposals_refuse(proposals, one)]
    spared = next(one for one in some if audited(one, 0, 0.05))
    first, second = [one for one in some if not audited(one, 0, 0.05)][:2]
    before = carried_out(proposals, first)
    assert before.measures is not None
    expected, raw = before.details["expected"], before.measures.divergence
    assert before.state == "complete" and expected > 0 and "rule" not in before.details
    assert memory.curves.ratios == [raw / expected]
    memory.rule.ratios[:] = [1e-9]  # linear students say nothing
    memory.known[:] = [(0, 1e-9)]
    memory.curves.ratios[:] = [0.2] * 9  # too few to know what fits may still come to
    assert carried_out(proposals, some[-1]).state == "complete" and len(memory.curves.ratios) == 10
    memory.known[:] = [(0, 1e-9)]
    memory.curves.ratios[:] = [0.2] * 10
    outcome = carried_out(proposals, second)
    assert outcome.state == "pruned" and outcome.values() is None
    assert outcome.details["reason"].startswith("given up after 25% of its fit: at best")
    rule = outcome.details["rule"]
    assert rule["after"] == 0.25 and rule["linear"] == outcome.details["expected"]
    assert rule["bound"] == pytest.approx(0.2 * rule["linear"])
    assert "fit" not in outcome.details and outcome.details["seconds"]["fitting"] > 0
    assert len(memory.curves.ratios) == 10  # nobody knows what it would have come to
    audit = carried_out(proposals, spared)
    assert audit.state == "complete" and audit.details["audited"] and audit.details["rule"]["after"] == 0.25
    assert len(memory.curves.ratios) == 11


def test_a_student_has_to_beat_its_linear_one_healed(tmp_path: Path, monkeypatch: Any) -> None:
    """Which is measured where it may decide, once, and remembered by a study that goes on."""
    proposals = made(tmp_path, audit=0.0)
    every = [splice(proposals, "mlp", 2, span=k) for k in range(len(proposals.space.spans))]
    one = [one for one in every if proposals.bench.may_heal(proposals.space.span(one))][-1]
    span, memory = proposals.space.span(one), proposals.memory
    linear = proposals._linear_divergence(span)
    assert linear is not None
    part = Part(span, "ridge", 0)
    healed = proposals.bench.validation.measure(
        proposals._composed([part]).model(proposals.bench.teacher)
    ).divergence
    assert healed < linear
    monkeypatch.setattr(RidgeRule, "rho", 1.0)
    memory.known.append((0, 0.5 * (healed + linear)))  # the linear one could not beat it, healed it does
    fitted = carried_out(proposals, one)
    assert fitted.state == "complete" and fitted.details["linear_healed"] == pytest.approx(healed)
    assert fitted.details["linear_divergence"] == linear
    raw = fitted.details.get("unhealed", {}).get("divergence", fitted.measures.divergence)
    assert memory.rule.ratios == [raw / linear]  # neither of them healed
    assert memory.healed == {span.name: fitted.details["linear_healed"]}
    memory.known.append((0, 0.9 * healed))
    measured: list[Any] = []
    monkeypatch.setattr(proposals, "_composed", measured.append)
    pruned = carried_out(proposals, replace(one, size=3))
    assert pruned.state == "pruned" and pruned.details["rule"]["linear"] == pytest.approx(healed)
    assert not measured and "linear_healed" not in pruned.details


def proposals_refuse(proposals: Proposals, one: Splice) -> bool:
    return refusal(one.family, proposals.space.span(one), one.size) is not None


def test_the_rule_learns_from_what_was_fitted_and_the_linear_baseline_is_measured_once(
    tmp_path: Path, monkeypatch: Any
) -> None:
    proposals = made(tmp_path)
    ridge = carried_out(proposals, splice(proposals, "ridge"))
    assert ridge.measures is not None and proposals.memory.rule.ratios == []
    measured = []
    original = proposals.bench.validation.measure
    monkeypatch.setattr(
        proposals.bench.validation, "measure", lambda *given: measured.append(1) or original(*given)
    )
    student = carried_out(proposals, splice(proposals, "mlp", 2))
    assert student.measures is not None and len(measured) == 1  # the ridge trial was the baseline
    assert student.details["linear_divergence"] == ridge.measures.divergence
    assert proposals.memory.rule.ratios == [student.measures.divergence / ridge.measures.divergence]
    assert proposals.memory.known == [
        (o.measures.flops, o.measures.divergence) for o in (ridge, student) if o.measures
    ]


def test_the_linear_baseline_is_what_the_ridge_trial_would_give(tmp_path: Path) -> None:
    one, other = made(tmp_path / "a", "cnn"), made(tmp_path / "b", "cnn")
    ridge = one.carry_out(splice(one, "ridge"))
    student = other.carry_out(splice(other, "conv", 1))
    assert ridge.measures is not None
    assert student.details["linear_divergence"] == ridge.measures.divergence


def test_rates_are_found_once_for_a_family_start_and_layout() -> None:
    searched = []

    def search() -> float:
        searched.append(1)
        return 0.1 * len(searched)

    class Span:
        stop = type("Point", (), {"layout": "map"})

    rates = Rates({"mlp warm map": 0.5})
    span: Any = Span()
    assert rates.get("mlp", span, "warm", search) == 0.5 and not searched
    assert rates.get("mlp", span, "scratch", search) == rates.get("mlp", span, "scratch", search) == 0.1
    assert rates.known == {"mlp warm map": 0.5, "mlp scratch map": 0.1} and len(searched) == 1


def test_seeds_differ_between_splices_and_studies_and_global_random_state_is_left_alone(
    tmp_path: Path,
) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b", seed=1)
    one, two = splice(first, "mlp", 2), splice(first, "mlp", 3)
    assert first.fitter.seed_of(one) == first.fitter.seed_of(one) != first.fitter.seed_of(two)
    assert first.fitter.seed_of(one) != second.fitter.seed_of(one)
    state = torch.get_rng_state()
    first.carry_out(one)
    assert torch.equal(torch.get_rng_state(), state)


def test_whatever_goes_wrong_is_a_failure_with_its_time_but_a_full_disk_is_raised(
    tmp_path: Path, monkeypatch: Any
) -> None:
    proposals = made(tmp_path)

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("oh")

    with monkeypatch.context() as patch:
        patch.setattr(fitter, "fit_student", broken)
        outcome = proposals.carry_out(splice(proposals, "ridge"))
    assert outcome.state == "failed" and outcome.details["reason"] == "ZeroDivisionError: oh"
    assert outcome.details["seconds"]["fitting"] > 0
    (tmp_path / "students").write_text("in the way")
    with pytest.raises(ss.StudyError, match="Cannot write"):
        proposals.carry_out(splice(proposals, "ridge"))


def test_a_student_whose_output_is_not_finite_fails(tmp_path: Path, monkeypatch: Any) -> None:
    proposals = made(tmp_path)
    original = fitter.fit_student

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        fitted = original(*args, **kwargs)
        for parameter in fitted.student.parameters():
            parameter.data.fill_(float("nan"))
        return fitted

    monkeypatch.setattr(fitter, "fit_student", spoiled)
    outcome = proposals.carry_out(splice(proposals, "ridge"))
    assert outcome.state == "failed" and "NaN" in outcome.details["reason"]
    assert proposals.memory.known == []
