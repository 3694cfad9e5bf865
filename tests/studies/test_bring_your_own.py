"""The template: reading it does no work, and as it stands it finds smaller models."""

import dataclasses
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import spansearch as ss
from benchmarks.zoo.models import importable_torchvision
from spansearch.store import read_study

FILE = Path(__file__).parents[2] / "studies" / "bring_your_own.py"


def load():
    task, search = read_study(FILE)
    return sys.modules[task.teacher.__module__], search


def test_reading_the_file_does_no_work_and_needs_no_further_package():
    before = "transformers" in sys.modules
    state = torch.get_rng_state()
    study, search = load()
    assert study.TASK.name == "my_model" and isinstance(search, ss.Search)
    assert torch.equal(state, torch.get_rng_state())
    assert ("transformers" in sys.modules) == before


def test_splits_are_disjoint_and_the_same_every_time():
    study, _ = load()
    parts = {part: study.split(part)[0] for part in ("calibration", "validation", "test")}
    assert {part: len(images) for part, images in parts.items()} == {
        "calibration": 1078,
        "validation": 359,
        "test": 360,
    }
    whole = torch.cat(list(parts.values())).flatten(1)
    assert len(whole.unique(dim=0)) == 1797
    assert torch.equal(study.split("test")[0], parts["test"])
    assert sum(len(batch["labels"]) for batch in study.batches("test")) == 360


def test_what_a_user_replaces_is_marked():
    text = FILE.read_text()
    assert text.count(". REPLACE: ") == 2 and len(text.splitlines()) < 170


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers itself
def test_the_model_of_transformers_learns_and_is_searched(tmp_path):
    if find_spec("torchvision") is not None:  # which transformers imports: one that fits no torch of the CPU
        importable_torchvision()
    if "CI" not in os.environ:  # where the extra is installed
        pytest.importorskip("transformers", reason="pip install -e '.[studies]'")
    study, search = load()
    model = study.train(epochs=8)
    assert not model.training
    assert study.accuracy(model, study.batches("validation")) > 0.5
    task = dataclasses.replace(study.TASK, teacher=lambda: model)
    run = ss.Study(task, directory=tmp_path, search=dataclasses.replace(search, polish=False))
    run.run(trials=8)
    front = run.front()
    small = front[0].load()
    assert type(small) is type(model)
    assert small(pixel_values=study.split("test")[0][:3]).logits.shape == (3, 10)
