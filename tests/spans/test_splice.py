"""What a splice changes and what it must not."""

import copy
import itertools

import models as m
import pytest
import torch
from students_for_spans import Glued, Own, Recorded, same, student
from torch import nn

from spansearch.cost import cost
from spansearch.errors import SpanError
from spansearch.spans import find_spans, overlap, splice
from spansearch.spans.slots import Slot
from spansearch.spans.taps import Tap, tapped


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "pointers": [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()],
        "hooks": [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in model.modules()],
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "grads": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
    }


def test_the_model_is_untouched():
    model = m.Cnn().train()
    model.fc.weight.requires_grad_(False)
    model.stem.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 1, 8, 8)
    model(x).sum().backward()
    before = snapshot(model)
    found = find_spans(model, x)
    for span in [
        found["layer1.0", "layer1.1"],
        found["stem", "layer1.0"],
        found["layer1.0", "layer1.1.relu@1"],
    ]:
        small = splice(model, {span: student(span)})
        assert type(small) is m.Cnn and small is not model
        small.train()(x).sum().backward()
        torch.optim.SGD(small.parameters(), 0.1).step()
        assert same(before, snapshot(model))


def test_state_dict_keys_of_what_stays_are_unchanged():
    model = m.warmed(m.Cnn(), 1, 8, 8)
    found = find_spans(model, torch.randn(4, 1, 8, 8))
    for span in found:
        small = splice(model, {span: student(span)})
        kept = {key for key in small.state_dict() if ".student." not in key}
        gone = [key for key in model.state_dict() if not any(key.startswith(f"{p}.") for p in span.modules)]
        assert kept >= set(gone) and kept <= set(model.state_dict())
        assert len(small.state_dict()) == len(kept) + 2
        fresh = splice(model, {span: student(span)})
        fresh.load_state_dict(small.state_dict(), strict=True)
        assert same(dict(fresh.state_dict()), dict(small.state_dict()))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_copy_of_the_spans_own_modules_gives_equal_bits(inplace):
    model = m.residual_mlp(inplace)
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    own = copy.deepcopy(model)
    students = {
        ("input", "1"): own[:2],
        ("0", "2"): own[1:3],
        ("1", "2"): own[2],
        ("1", "2.fc2"): nn.Sequential(own[2].fc1, own[2].act, own[2].fc2),
        ("1.fc1", "1.fc2"): nn.Sequential(own[1].act, own[1].fc2),
    }
    wanted = model(x.clone())
    for ends, replacement in students.items():
        small = splice(model, {found[ends]: replacement})
        for batch in (x, torch.randn(9, 6)):
            assert torch.equal(small(batch.clone()), model(batch.clone())), ends
    for pair in itertools.combinations(students, 2):
        spans = [found[ends] for ends in pair]
        if not overlap(*spans):
            small = splice(model, dict(zip(spans, [students[ends] for ends in pair], strict=True)))
            assert torch.equal(small(x.clone()), wanted), pair


@pytest.mark.parametrize("substitute", [True, False])
def test_a_replay_gives_identical_outputs(substitute):
    model = m.warmed(m.Cnn(), 1, 8, 8)
    x = torch.randn(4, 1, 8, 8)
    found = find_spans(model, x)
    kinds = set()
    for span in found:
        if span.plan.substitute == substitute:
            stop = Tap(span.stop)
            with tapped(model, [stop]):
                wanted = model(x)
            kinds.add(span.nested)
            assert torch.equal(splice(model, {span: Recorded(stop.value)})(x), wanted), span.name
    assert kinds == ({True, False} if substitute else {False})


@pytest.mark.parametrize("glue", ["".join(g) for g in itertools.product("ms", "gs", "gs", "s")])
def test_adjacent_spans(glue):
    glue = glue.replace("s", "m")
    model = Glued(glue).eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    ends = ["input", *(f"steps.{i}.1" if g == "g" else f"steps.{i}" for i, g in enumerate(glue))]
    for a, b, c in itertools.combinations(range(5), 3):
        first, second = found[ends[a], ends[b]], found[ends[b], ends[c]]
        assert first.plan.substitute == ("g" not in glue[a:b])
        assert not overlap(first, second)
        for order in ([first, second], [second, first]):
            students = {first: Own(model, slice(a, b)), second: Own(model, slice(b, c))}
            small = splice(model, {span: students[span] for span in order})
            assert torch.equal(small(x), model(x))
            assert torch.equal(small(x[:1]), model(x[:1]))


def test_spans_that_overlap_are_refused():
    model = m.mlp()
    found = find_spans(model, torch.randn(4, 6))
    a, b = found["0", "2"], found["1", "3"]
    with pytest.raises(SpanError, match="0 -> 2 and 1 -> 3 overlap"):
        splice(model, {a: student(a), b: student(b)})
    with pytest.raises(SpanError, match="no span given"):
        splice(model, {})
    with pytest.raises(SpanError, match=r"ReLU has no module '[12]'"):
        splice(nn.ReLU(), {a: student(a)})


def test_nested_spans_of_different_blocks():
    model = m.residual_mlp()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    spans = [found["0", "1.fc2"], found["2.fc1", "2.fc2"]]
    small = splice(model, {span: student(span) for span in spans})
    h = model[0](x)
    h = h + small[1].fc1.student(h)
    assert torch.allclose(small(x), model[3](h + small[2].act.student(model[2].fc1(h))))


def test_gradients_reach_the_student_in_both_ways():
    model = Glued("mgm").eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    for ends in [("input", "steps.0"), ("steps.0", "steps.1.1")]:
        small = splice(model, {found[ends]: student(found[ends])})
        small(x).sum().backward()
        grads = {name: p.grad for name, p in small.named_parameters()}
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values()), ends
        assert all(p.grad is None for p in model.parameters())


def test_deepcopies_dtypes_and_modes():
    model = Glued("mgm").eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    for ends in [("input", "steps.0"), ("steps.0", "steps.1.1")]:
        small = splice(model, {found[ends]: nn.Sequential(nn.Dropout(0.5), student(found[ends]))})
        assert not any(module.training for module in small.modules())
        twin = copy.deepcopy(small)
        assert torch.equal(twin(x), small(x))
        for p in twin.parameters():
            p.data.zero_()
        assert not torch.equal(twin(x), small(x))
        assert all(module.training for module in small.train().modules()) and not model.training
        double = copy.deepcopy(small).eval().to(torch.float64)
        assert torch.allclose(double(x.double()).float(), small.eval()(x), atol=1e-5)
        assert double(x.double()).dtype is torch.float64


def test_a_student_of_the_wrong_shape_is_named():
    model = Glued("mgm").eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    for ends in [("input", "steps.0"), ("steps.0", "steps.1.1")]:
        for wrong in [nn.Linear(6, 5), nn.Unflatten(1, (2, 3)), nn.LSTM(6, 6), Recorded(torch.ones(3, 6))]:
            with pytest.raises(SpanError, match=r"the student must return shape \(N, 6\), got"):
                splice(model, {found[ends]: wrong})(x)


@pytest.mark.parametrize("batch", [4, 7])
def test_what_is_replaced_costs_nothing_at_any_batch_size(batch):
    """Fillers ask the meta device for sizes: once for every new size, and no flop counter sees it."""
    model = m.mlp().eval()
    found = find_spans(model, torch.randn(4, 6))
    span = found["input", found.cuts[-1].name]
    small = splice(model, {span: student(span)})
    x = torch.randn(batch, 6)
    assert cost(small, x).flops == cost(student(span), x).flops < cost(model, x).flops
    asked = [slot.known_sizes for slot in small.modules() if isinstance(slot, Slot)]
    before = [dict(sizes) for sizes in asked]
    small(x)
    assert asked == before and any(asked) == (batch != 4)
