"""A member of a front is written to two files and put together again with its teacher."""

import copy
import json

import pytest
import tasks
import torch
from safetensors.torch import load_file
from torch import nn

import spansearch as ss

FAMILIES = ("identity", "ridge", "lowrank", "thin", "truncated", "conv", "mlp")


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def study(request, tmp_path_factory):
    made = ss.Study(
        tasks.make(request.param),
        directory=tmp_path_factory.mktemp("run"),
        search=tasks.quick(families=FAMILIES, seeds=6),
        device="cpu",
    )
    made.run(24)
    return made


def _example(study):
    return next(iter(study.task.calibration()))[0]


def test_it_computes_the_same_to_the_bit(study, tmp_path):
    x, teacher = _example(study), study.task.teacher()
    before = copy.deepcopy(teacher.state_dict())
    front, kept = [*study.front(), *study.front(y="divergence"), *study.front(closed_form=True)], set()
    assert len({splice.family for member in front for splice in member.splices}) > 1
    for member in front:
        member.save(tmp_path / str(member.trial))
        again = ss.load(tmp_path / str(member.trial), teacher, x)
        assert type(again) is type(teacher) and not again.training
        with torch.no_grad():
            assert torch.equal(again(x), member.load()(x))
        said = json.loads((tmp_path / str(member.trial) / "recipe.json").read_text())
        assert said["measures"]["flops"] == member.measures.flops
        kept |= {
            name.split("/")[0] for name in load_file(tmp_path / str(member.trial) / "students.safetensors")
        }
    # students; of the CNN also layers corrected behind them and weights that were polished
    assert kept >= ({"0", "healed", "tuned"} if study.task.name == "tiny_cnn" else {"0"})
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_another_teacher_or_damaged_files_are_refused(study, tmp_path):
    x, teacher = _example(study), study.task.teacher()
    member = study.front()[0]
    member.save(tmp_path / "small")
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(ss.StudyError, match="other weights"):
        ss.load(tmp_path / "small", other, x)
    with pytest.raises(ss.StudyError, match="other weights"):
        ss.load(tmp_path / "small", nn.Linear(2, 2), x)
    with pytest.raises(ss.StudyError, match="holds no smaller network"):
        ss.load(tmp_path / "nowhere", teacher, x)
    students = tmp_path / "small" / "students.safetensors"
    data = bytearray(students.read_bytes())
    data[-1] ^= 1
    students.write_bytes(bytes(data))
    with pytest.raises(ss.StudyError, match="SHA-256 differs"):
        ss.load(tmp_path / "small", teacher, x)
    recipe = tmp_path / "small" / "recipe.json"
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "format": 99}))
    with pytest.raises(ss.StudyError, match="not of format"):
        ss.load(tmp_path / "small", teacher, x)


def test_its_weights_do_not_pass_for_those_of_the_plain_model(study, tmp_path):
    member = study.front()[0]
    member.save(tmp_path / "small")
    with pytest.raises(RuntimeError, match="Missing key"):
        study.task.teacher().load_state_dict(load_file(tmp_path / "small" / "students.safetensors"))
