"""Students made of the model's own layers, in the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import Cnn, SharedRelu, warmed
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans import InPlace, Span, Spans, find_spans, splice
from spansearch.students import family

IMAGE = (1, 8, 8)


def network() -> tuple[nn.Module, Spans, Tensor]:
    model = warmed(Cnn(), *IMAGE)
    x = torch.randn(4, *IMAGE)
    return model, find_spans(model, x), x


def thin(span: Span, size: int = 2) -> InPlace:
    student = family("thin").build(span, size)
    assert isinstance(student, InPlace)
    return student.eval()


def layer1(found: Spans) -> Span:
    return found["layer1.0", "layer1.1"]


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_what_is_stored_has_the_users_own_names():
    """Only a bias that the solved layer did not have comes in addition."""
    model, found, _ = network()
    small = splice(model, {layer1(found): thin(layer1(found))})
    assert type(small) is Cnn
    assert set(small.state_dict()) - set(model.state_dict()) == {"layer1.1.conv2.bias"}
    assert set(model.state_dict()) <= set(small.state_dict())
    assert [n for n, _ in small.named_modules()] == [n for n, _ in model.named_modules()]
    changed = [n for n, t in model.state_dict().items() if small.state_dict()[n].shape != t.shape]
    assert changed == [
        "layer1.1.conv1.weight",
        *(f"layer1.1.bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        "layer1.1.conv2.weight",
    ]


def test_a_splice_leaves_the_model_and_the_student_as_they_were():
    model, found, x = network()
    student, y = thin(layer1(found)), run(model, x)
    before, own = copy.deepcopy(model.state_dict()), copy.deepcopy(student.state_dict())
    small = splice(model, {layer1(found): student})
    run(small, x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(t, own[n]) for n, t in student.state_dict().items())
    assert torch.equal(run(model, x), y) and not torch.equal(run(small, x), y)


def test_attributes_change_in_the_copy_alone():
    from hidden_models import attending

    model, x = attending("fused"), torch.randn(4, 4, 5)
    span = find_spans(model, x)["stem", "head:input"]
    small = splice(model, {span: thin(span)})
    assert (small.attention.num_heads, model.attention.num_heads) == (2, 3)
    assert run(small, x).shape == run(model, x).shape


def test_by_itself_it_computes_nothing():
    _, found, _ = network()
    with pytest.raises(SpanError, match=r"put it there with spansearch\.splice"):
        thin(layer1(found))(torch.randn(2, 4, 8, 8))


def test_a_copy_computes_the_same_and_apart():
    model, found, x = network()
    student = thin(layer1(found))
    y, twin = run(splice(model, {layer1(found): student}), x), copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(run(splice(model, {layer1(found): twin}), x), y)
    assert twin.inner == student.inner and twin.attributes == student.attributes


def test_weights_that_are_saved_go_into_one_built_anew(tmp_path: Path):
    model, found, x = network()
    student = thin(layer1(found))
    torch.save(student.state_dict(), tmp_path / "student.pt")
    torch.manual_seed(7)
    again = thin(layer1(found))
    again.load_state_dict(torch.load(tmp_path / "student.pt"))
    spliced = [run(splice(model, {layer1(found): s}), x) for s in (student, again)]
    assert torch.equal(*spliced)


def test_the_state_of_the_spliced_model_goes_into_another():
    model, found, x = network()
    one, other = (splice(model, {layer1(found): thin(layer1(found))}) for _ in range(2))
    assert not torch.equal(run(one, x), run(other, x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(run(one, x), run(other, x))


def test_two_at_once_are_one_after_the_other():
    model, found, x = network()
    first, second = found["layer1.0:input", "layer1.0"], layer1(found)
    students = {first: thin(first), second: thin(second)}
    both = run(splice(model, students), x)
    one = splice(model, {first: students[first]})
    assert torch.equal(both, run(splice(one, {second: students[second]}), x))
    assert not torch.equal(both, run(one, x))


def test_next_to_a_student_in_a_slot():
    model, found, x = network()
    first, second = found["layer1.0:input", "layer1.0"], layer1(found)
    small = splice(model, {first: nn.Identity(), second: thin(second)})
    run_on = copy.deepcopy(small)
    short = splice(model, {first: nn.Identity()})
    short.layer1[1] = small.layer1[1]
    assert torch.equal(run(run_on, x), run(short, x)) and not torch.equal(run(small, x), run(model, x))


def test_the_same_layers_twice_are_refused():
    _, found, _ = network()
    model = warmed(Cnn(), *IMAGE)
    wide = found["layer1.0:input", "layer1.1"]
    with pytest.raises(SpanError, match="overlap"):
        splice(model, {wide: thin(wide), layer1(found): thin(layer1(found))})


def test_a_model_of_another_structure_is_refused():
    _, found, _ = network()
    with pytest.raises(SpanError, match="no module 'layer1"):
        splice(nn.Sequential(nn.Linear(2, 2)), {layer1(found): thin(layer1(found))})


def test_a_module_with_two_names_changes_under_both():
    model = SharedRelu().eval()
    model.again = model.blocks[1]
    span = find_spans(model, torch.randn(4, 6))["blocks.0", "blocks.1"]
    small = splice(model, {span: thin(span)})
    assert small.again is small.blocks[1] and small.again[0].out_features == 2


def test_the_spliced_model_trains():
    model, found, x = network()
    small = splice(model, {layer1(found): thin(layer1(found))}).train()
    assert all(module.training for module in small.modules())
    optimizer = torch.optim.SGD(small.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        loss = small(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None for p in small.parameters())


@pytest.mark.filterwarnings("ignore")  # of torch.export itself
def test_the_spliced_model_is_exported():
    model, found, x = network()
    small = splice(model, {layer1(found): thin(layer1(found))}).eval()
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), run(small, x))


def test_a_shortened_span_keeps_what_lies_in_front():
    model, found, x = network()
    whole, tail = found["layer1.0:input", "layer1.1"], layer1(found)
    student = InPlace({}, inner={tail: nn.Identity()})
    model_of = splice(model, {tail: nn.Identity()})
    assert torch.equal(run(splice(model, {whole: student}), x), run(model_of, x))
    assert student.stop_of(whole).name == "layer1.1"
