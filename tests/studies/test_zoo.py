"""Models of torchvision, timm and transformers: examined, and what is declared legal works.

Few spans of each, and of timm every twelfth model; `python studies/benchmarks/zoo/command.py` tries them all.
"""

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import torch

from benchmarks.zoo import command, models
from benchmarks.zoo.probe import Specimen, probe, warm

SPANS = 2
ZOO = [
    (library, name)
    for library, (_, names) in models.LIBRARIES.items()
    for name in (names[::12] if library == "timm" else names)
]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # these libraries' own
@pytest.mark.parametrize(("library", "name"), ZOO, ids=str)
def test_what_is_declared_legal_works(library, name):
    if "CI" not in os.environ:  # where the extra is installed
        pytest.importorskip(library, reason="pip install -e '.[zoo]'", exc_type=(ImportError, RuntimeError))
    record = probe(models.specimen(library, name), SPANS, exported=0)
    assert "error" not in record and record["failures"] == []
    assert record["tried"] == SPANS


class Forgetful(nn.Module):
    """Passes a value by, outside autograd, so that a span that the graph declares legal fails."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.second(torch.tanh(self.first(x)))
        return self.third(y + 10 * x.detach().mean())


def specimen(library, name):
    """One that works, one that does not, and one that is not even built."""
    torch.manual_seed(0)
    if name == "broken":
        raise RuntimeError("not built")
    good = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    batches = [torch.randn(4, 6) for _ in range(2)]
    return Specimen(library, name, warm(good if name == "good" else Forgetful(), batches), batches)


def test_the_command_says_what_fails_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "specimen", specimen)
    monkeypatch.setitem(models.LIBRARIES, "timm", (None, ["good", "forgetful", "broken"]))
    given = ["--library", "timm", "--spans", "6", "--out", str(tmp_path / "zoo.json")]
    first = CliRunner().invoke(command.main, given, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    page = (tmp_path / "zoo.md").read_text()
    assert "| timm | 2 of 3 |" in page and "not built" in page
    assert "| timm forgetful | " in page and "also depends on something" in page
    assert "timm good |" in page and "| timm good | -" not in page.split("## Models")[0]
    lines = (tmp_path / "zoo.jsonl").read_text()
    monkeypatch.setattr(command, "examined", None)  # nothing is measured twice
    assert CliRunner().invoke(command.main, given, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "zoo.jsonl").read_text() == lines


def test_a_probe_counts_what_it_tries(monkeypatch):
    record = probe(specimen("timm", "good"), 6, exported=2)
    assert record["tried"] == 6 and record["failures"] == [] and record["exports"] == 2
    assert record["cuts"] == 5 and record["graph_spans"] == 10
    bad = probe(specimen("timm", "forgetful"), 6, exported=0)
    assert {step for _, step, _ in bad["failures"]} == {"verify"}
