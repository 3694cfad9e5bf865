"""What splices cost before and after, against flops counted on the spliced model."""

from pathlib import Path

import pytest
from study_runs import new, outcomes

import spansearch as ss

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> ss.Study:
    made = new(tmp_path_factory.mktemp("run"), "cnn", seed=1)
    made.run(24)
    return made


def test_of_every_model_the_savings_add_up(study: ss.Study) -> None:
    whole, several = study.bench.found.flops, 0
    for _, outcome in outcomes(study):
        if outcome.measures is None or "duplicate_of" in outcome.details:
            continue
        costs = outcome.details["costs"]
        assert len(costs) == len(outcome.recipe)
        saved = sum(before - after for before, after in costs)
        assert saved == pytest.approx(whole - outcome.measures.flops, rel=0.02, abs=0.01 * whole)
        several += len(costs) > 1
    assert several, "compositions were tried"


def test_duplicates_and_polished_models_keep_it(study: ss.Study) -> None:
    kept = [o for _, o in outcomes(study) if "duplicate_of" in o.details or o.polished]
    assert kept
    for outcome in kept:
        assert len(outcome.details["costs"]) == len(outcome.recipe)


def test_what_a_proposal_would_cost_is_known_where_it_is_not_fitted(tmp_path: Path) -> None:
    study = new(tmp_path, "mlp", seed=3)
    study.run(10)
    teacher = study.bench.validation.teacher_cost.flops
    planned = [o.details["planned_flops"] for _, o in outcomes(study) if "planned_flops" in o.details]
    assert planned and all(0 <= flops <= teacher for flops in planned)
