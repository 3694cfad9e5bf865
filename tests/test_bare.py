"""What a model may be wrapped in."""

import pytest
import torch
from torch import nn

import spansearch as ss
from spansearch.bare import bare


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_a_compiled_model_is_taken_as_what_was_compiled():
    model, x = _model(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="eager")
    found = ss.find_spans(compiled, x)
    assert [span.name for span in found.spans] == [span.name for span in ss.find_spans(model, x).spans]
    assert any("torch.compile is taken off" in note for note in found.notes)
    small = ss.splice(compiled, {found["input", "0"]: nn.Linear(6, 8)})
    assert type(small) is nn.Sequential and small(x).shape == (4, 3)
    assert ss.cost(compiled, x) == ss.cost(model, x)
    ss.verify(compiled, found["input", "0"], [x])


@pytest.mark.parametrize(
    ("wrapped", "said"),
    [
        (nn.DataParallel, "Give model.module"),
        (torch.jit.script, "the model .* is TorchScript"),
        (lambda model: nn.Sequential(nn.Identity(), torch.jit.script(model)), "^1 .* is TorchScript"),
        (lambda model: model.forward, "expected a torch.nn.Module, got method"),
        (lambda model: torch.ao.nn.quantized.Linear(6, 3), "is quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(deprecated|no longer supported|TypedStorage)")
def test_what_cannot_be_taken_apart_is_refused(wrapped, said):
    model = wrapped(_model())
    with pytest.raises(ss.SpanError, match=said):
        ss.find_spans(model, torch.randn(4, 6))


def test_weights_of_whole_numbers_are_refused():
    model = _model()
    model[2].weight = nn.Parameter(torch.ones(3, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ss.SpanError, match=r"2 \(Linear\) is quantised"):
        bare(model)
