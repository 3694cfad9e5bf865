"""Models are exported with the same outputs, or not at all."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from torch import Tensor, nn
from toy_task import toy

import spansearch as ss
from spansearch.errors import ExportError
from spansearch.export import Exported, export, formats
from spansearch.outcome import loss
from spansearch.spans.kv_cache import keep_length

FAMILIES = ("identity", "ridge", "lowrank", "thin", "truncated", "conv", "mlp")
ENDINGS = ("small.pt2", "small.safetensors", "small/")


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def study(request: Any, tmp_path_factory: pytest.TempPathFactory) -> ss.Study:
    directory = tmp_path_factory.mktemp("run")
    search = tasks.quick(families=FAMILIES, seeds=6)
    made = ss.Study(tasks.make(request.param), directory=directory, search=search, device="cpu")
    made.run(14)
    return made


def write(model: nn.Module, batches: list[Any], path: Path | str, **task: Any) -> Exported:
    """Export a model of a task whose validation has these batches."""

    def never(directory: Path) -> nn.Module:
        raise AssertionError

    return export(toy(validation=lambda: batches, **task), model.eval(), path, "cpu", never)


def loaded(path: Path) -> Any:
    return torch.export.load(path).module()


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_member_computes_the_same(study: ss.Study, ending: str, tmp_path: Path) -> None:
    for member in study.front():
        made = member.export(f"{tmp_path}/{member.trial}/{ending}")
        assert made.difference <= 1e-4 and made.examples == 96 and made.batch is None
        assert made.params <= member.measures.params and made.path.exists() and made.bytes > 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_program_takes_any_batch_and_holds_no_data(study: ss.Study, tmp_path: Path) -> None:
    member = study.front()[-1]
    path = member.export(tmp_path / "small.pt2").path
    x = next(iter(study.task.validation()))[0]
    for count in (1, 7, 64):
        torch.testing.assert_close(loaded(path)(x[:count]), member.load()(x[:count]))
    assert torch.export.load(path).example_inputs is None
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


ELSEWHERE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("spansearch", "tasks"):
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
import torch

x = torch.load("x.pt")
torch.save(torch.export.load("small.pt2").module()(x), "y.pt")
try:
    import spansearch
except ImportError:
    print("loaded without")
"""


def test_a_program_loads_without_spansearch_and_the_model_s_class(study: ss.Study, tmp_path: Path) -> None:
    member = study.front()[-1]
    member.export(tmp_path / "small.pt2")
    x = next(iter(study.task.validation()))[0][:5]
    torch.save(x, tmp_path / "x.pt")
    ended = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout == "loaded without\n", ended.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), member.load()(x))


def test_onnx_runs_any_batch_under_the_arguments_names(study: ss.Study, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    member = study.front()[-1]
    made = member.export(tmp_path / "small.onnx")
    assert made.difference <= 1e-4 and made.batch is None
    session = runtime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["output"]
    x = next(iter(study.task.validation()))[0][:3]
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), member.load()(x).detach(), rtol=1e-4, atol=1e-5)


def test_any_trial_with_a_model_can_be_had(study: ss.Study, tmp_path: Path) -> None:
    trials = [t.number for t in study.finished() if t.values is not None]
    off = next(number for number in trials if number not in {m.trial for m in study.front()})
    assert study.member(off).export(tmp_path / "small.pt2").difference <= 1e-4
    with pytest.raises(ss.StudyError, match="no finished trial 99"):
        study.member(99)


def test_the_member_of_least_loss_within_a_share(study: ss.Study) -> None:
    front = study.front()
    for share in (0.4, 0.8, 1.0):
        among = [m for m in front if m.measures.flops_ratio <= share]
        if among:
            assert loss(front.at(share).measures) == min(loss(m.measures) for m in among)
    with pytest.raises(ss.StudyError, match="the cheapest comes to"):
        front.at(1e-9)


class Normed(nn.Module):
    """Norms and linear maps that can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3, padding=1, stride=2, groups=2),
            nn.BatchNorm2d(6, affine=False),
            nn.Conv2d(6, 9, 3, padding="same"),
            nn.Dropout(),
            nn.Conv2d(9, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With statistics and weights of norms that are not those of a fresh one."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model(x)
    return model.eval()


def test_norms_and_linear_maps_are_folded_and_the_model_is_not_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 9, 9)
    model = settled(Normed(), x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = write(model, [x[:12], x[12:]], tmp_path / "small.pt2")
    assert made.folded == (3, 3) and made.difference < 1e-5 and made.batch is None
    # conv, conv, conv with the 1 x 1 in it, and one linear map of the head
    assert made.params == (8 * 27 + 8) + (6 * 4 * 9 + 6) + (4 * 6 * 9 + 4) + (2 * 4 + 2)
    program = torch.export.load(tmp_path / "small.pt2")
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert sum(value.numel() for value in program.state_dict.values()) == made.params
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Unfoldable(nn.Module):
    """Neighbours that must stay: two thin layers, a map read twice, a norm of other channels, one weight
    twice."""

    def __init__(self) -> None:
        super().__init__()
        self.thin = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
        self.twice = nn.Linear(8, 8)
        self.positions = nn.BatchNorm1d(5)
        self.tied = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.thin(x).tanh())
        y = self.positions(y) + y.tanh()
        y = self.positions(self.twice(y))
        return self.tied(self.tied(y))


def test_what_would_change_or_grow_is_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 8)
    made = write(settled(Unfoldable(), x), [x], tmp_path / "small.pt2")
    assert made.folded == (0, 0) and made.difference < 1e-5


def test_a_fold_that_is_not_exact_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spansearch.export.program.EXACT", -1.0)
    x = torch.randn(4, 3, 9, 9)
    assert write(settled(Normed(), x), [x], tmp_path / "small.pt2").folded == (0, 0)


class OneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rows = nn.Linear(3, 2), nn.Parameter(torch.randn(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.rows


def test_a_model_of_one_batch_size_says_why(tmp_path: Path) -> None:
    batches = [torch.randn(4, 3), torch.randn(4, 3)]
    made = write(OneSize(), batches, tmp_path / "small.pt2")
    assert (
        made.batch == 4
        and "does not permit others" in made.reason
        and "\n" not in made.reason
        and made.examples == 8
    )
    assert loaded(tmp_path / "small.pt2")(batches[0]).shape == (4, 2)


class Kept:
    """A key-value cache that stores nothing."""

    layers = (object(),)
    layer_class_to_replicate = object

    def get_seq_length(self) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, number: int) -> None:
        assert keys.shape == values.shape


class Cached(nn.Module):
    """Notes in a cache what came by, as a student in a language model does."""

    def forward(self, x: Tensor) -> Tensor:
        keep_length(Kept(), (7,), x)
        return x * 2


def test_a_student_beside_a_cache_fixes_no_batch_size(tmp_path: Path) -> None:
    assert write(Cached(), [torch.randn(4, 3, 2)], tmp_path / "small.pt2").batch is None


def test_validation_of_single_examples_allows_larger_batches(tmp_path: Path) -> None:
    made = write(nn.Linear(3, 2), [torch.randn(1, 3) for _ in range(3)], tmp_path / "small.pt2")
    assert made.batch is None and made.examples == 3
    assert loaded(tmp_path / "small.pt2")(torch.randn(9, 3)).shape == (9, 2)


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, None]
    cache: object = None


class Reader(nn.Module):
    """Keyword arguments, one of them no tensor, and an output of a class of its own; tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, keep: Tensor | None = None, scaled: bool = False) -> Output:
        assert keep is not None
        h = (self.embed(ids) * keep[..., None]).tanh()
        return Output(self.head(h) * (2.0 if scaled else 1.0), (h, None), cache=object())


def read(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(ids=batch["ids"], keep=batch["keep"], scaled=True).logits


READ = [
    {"ids": torch.randint(0, 11, (n, 5)), "keep": torch.ones(n, 5), "labels": torch.ones(n)} for n in (4, 3)
]


def test_keyword_arguments_and_outputs_of_a_class(tmp_path: Path) -> None:
    made = write(Reader(), READ, tmp_path / "small.pt2", forward=read)
    assert made.batch is None and made.examples == 7 and made.params == 66
    program = loaded(tmp_path / "small.pt2")
    out = program(keep=torch.ones(2, 5), ids=torch.ones(2, 5).long())
    assert sorted(out) == ["hidden", "logits"] and type(out) is dict and len(out["hidden"]) == 1


def test_lengths_that_differ_in_validation_are_free(tmp_path: Path) -> None:
    texts = [{"ids": torch.ones(n, t).long(), "keep": torch.ones(n, t)} for n, t in ((4, 5), (4, 9), (2, 3))]
    made = write(Reader(), texts, tmp_path / "small.pt2", forward=read)
    assert made.batch is None and made.examples == 10
    out = loaded(tmp_path / "small.pt2")(ids=torch.ones(3, 20).long(), keep=torch.ones(3, 20))
    assert out["logits"].shape == (3, 20, 11)


class Lengths(nn.Module):
    """Another function of long texts than of short ones: one program cannot be both."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if x.shape[1] > 4 else x.sum(1)


def test_a_length_that_a_program_cannot_take_is_told(tmp_path: Path) -> None:
    batches = [torch.randn(4, 6, 2), torch.randn(4, 3, 2)]
    with pytest.raises(ExportError, match=r"does not run on a validation batch of tensors \[\(4, 3, 2\)\]"):
        write(Lengths(), batches, tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())


def test_keyword_arguments_in_onnx(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    path = write(Reader(), READ, tmp_path / "small.onnx", forward=read).path
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["ids", "keep"]
    assert [one.name for one in session.get_outputs()] == ["logits", "hidden.0"]


def test_tied_weights_are_stored_under_each_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = Reader()
    assert write(model, READ, tmp_path / "a.safetensors", forward=read).params == 66
    state = load_file(tmp_path / "a.safetensors")
    assert list(state) == ["embed.weight", "head.weight"]
    again = Reader()
    again.load_state_dict(state)
    assert torch.equal(again.embed.weight, model.embed.weight)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ExportError, match=r"cannot trace this model: .*recipe/"):
        write(Branching(), [x], tmp_path / "small.pt2")
    with pytest.raises(ExportError, match="it computes something else"):
        write(Drawing(), [x], tmp_path / "small.pt2")
    with pytest.raises(ExportError, match=r"'\.h5', which is no format.*\.pt2, \.onnx, \.safetensors"):
        write(nn.Linear(3, 2), [x], tmp_path / "small.h5")
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_stays_where_an_export_fails(tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    path.write_bytes(b"kept")
    with pytest.raises(ExportError):
        write(Drawing(), [torch.randn(4, 3)], path)
    assert path.read_bytes() == b"kept" and list(tmp_path.iterdir()) == [path]


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(formats.onnx_file, "PACKAGES", ("onnxruntime",))
    with pytest.raises(ExportError, match=r"onnxruntime.*pip install 'spansearch\[onnx\]'"):
        write(nn.Linear(3, 2), [torch.randn(4, 3)], tmp_path / "small.onnx")
