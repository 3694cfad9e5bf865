"""spansearch export: a model as a file, or one message that says what is wrong."""

from pathlib import Path

import pytest
import tasks
import torch

import spansearch as ss

from .conftest import Run


@pytest.fixture
def study(tmp_path: Path, run: Run) -> Path:
    """A study of three trials in ./runs."""
    path = tasks.study_file(tmp_path / "study.py", "mlp")
    assert run("run", path, "--trials", "3").code == 0
    return path


def test_a_trial_and_the_best_within_a_share(run: Run, study: Path) -> None:
    front = ss.Study.open(study, device="cpu").front()
    x = next(iter(tasks.split(tasks.blobs(96, 3))))[0]
    for chosen, member in (
        (("--trial", front[0].trial), front[0]),
        (("--at", "100%"), front.at(1.0)),
    ):
        ended = run("export", "runs/tiny_mlp", *chosen, "--to", "small.pt2")
        assert ended.code == 0, ended.err
        for words in (
            f"trial {member.trial}: ",
            str(Path("small.pt2").absolute()),
            "KiB",
            "parameters",
            "largest relative difference",
            "on 96 of validation",
            "any size",
        ):
            assert words in ended.out
        torch.testing.assert_close(torch.export.load("small.pt2").module()(x), member.load()(x))


def test_a_recipe_and_its_weights(run: Run, study: Path) -> None:
    assert run("export", study, "--at", "1", "--to", "small/").code == 0
    assert run("export", study, "--at", "1", "--to", "small.safetensors").code == 0
    x = next(iter(tasks.split(tasks.blobs(96, 3))))[0]
    model = ss.load("small", tasks.teacher("mlp"), x)
    assert type(model) is torch.nn.Sequential


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "a.pt2"), ("--trial N", "--at 50%")),
        (("--trial", "0", "--at", "50%", "--to", "a.pt2"), ("--trial N", "--at 50%")),
        (("--trial", "0"), ("--to",)),
        (("--trial", "0", "--to", "a.h5"), (".pt2, .onnx, .safetensors",)),
        (("--trial", "77", "--to", "a.pt2"), ("no finished trial 77",)),
        (("--at", "0.0001%", "--to", "a.pt2"), ("No member of the front", "the cheapest comes to")),
        (("--at", "2e6", "--to", "a.pt2"), ("--at", "share")),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], words: tuple[str, ...], run: Run, study: Path) -> None:
    ended = run("export", study, *arguments)
    assert ended.code == 2 and ended.out == "" and not list(Path().glob("a.*"))
    errors = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), ended.err
