"""A study with everything that a report shows, and the page of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import tasks
from torch import nn

import spansearch as ss
from spansearch.cost import parameter_count
from spansearch.latency import Latency
from spansearch.students import family
from spansearch.workbench import Workbench

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
"""What a hostile or careless label looks like."""


def hostile_study(directory: Path) -> ss.Study:
    """A finished study of a tiny CNN: timed, scored on test, with failures whose reason is EVIL."""

    @ss.register("sometimes")
    class Sometimes:
        gradient, sized = False, False

        def refuses(self, span: Any) -> str | None:
            return None if span.start.layout == "map" and span.stop.layout == "map" else "maps only"

        def size(self, span: Any, width: float) -> int:
            return 0

        def build(self, span: Any, size: int) -> Any:
            return family("ridge").build(span, size)

        def solve(self, span: Any, size: int, evidence: Any) -> Any:
            raise RuntimeError(f"{EVIL} postgresql://me:hunter2@host/db")

    search = tasks.quick(families=("ridge", "thin", "conv", "sometimes"), cost="latency", seed=2)
    study = ss.Study(tasks.make("cnn"), directory=directory, search=search)

    def latency(bench: Workbench, model: nn.Module) -> Latency:
        """As if time followed from parameters: measuring it takes seconds a model."""
        count = parameter_count(model)
        ratio = 0.3 + 0.8 * count / parameter_count(bench.teacher)
        return Latency(1e-6 * count, (1e-6 * count,) * 2, ratio, (ratio - 0.05, ratio + 0.05), 1e-3, 8, 64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workbench, "latency", latency)
        study.run(30)
    study.front(split="test")
    return study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ss.Study]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield hostile_study(tmp_path_factory.mktemp("report") / "a run's")


@pytest.fixture(scope="session")
def data(study: ss.Study) -> dict[str, Any]:
    return study.report_data()
