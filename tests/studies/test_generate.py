"""Spliced language models of transformers write the same text with a key-value cache as without."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spansearch as ss
from spansearch.linear_layers import TokenWindows
from spansearch.students.attending import AttentionStudent

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from benchmarks.zoo import models

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # of transformers itself

NEW = 6


class Mean(nn.Module):
    """A student of whose reach nothing is known: the mean of all positions so far."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x):
        return self.linear(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


def _attention(d_in, d_out):
    student = AttentionStudent(d_in, d_out, 2, 8, 16, causal=True, depth=2)
    for attend in student.attend:
        nn.init.normal_(attend.distance)
    return student


STUDENTS = {
    "alone": nn.Linear,
    "window": lambda d_in, d_out: nn.Sequential(TokenWindows(2, 0), nn.Linear(3 * d_in, d_out)),
    "attention": _attention,
    "any": Mean,
}


def _model(name, **config):
    if "CI" not in os.environ:  # where the extra is installed
        pytest.importorskip(
            "transformers", reason="pip install -e '.[zoo]'", exc_type=(ImportError, RuntimeError)
        )
    specimen = models.specimen("transformers", name)
    model = specimen.model
    if config:
        for key, value in config.items():
            setattr(model.config, key, value)
        torch.manual_seed(0)
        model = type(model)(model.config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model, specimen.batches[0]["input_ids"]


def _spliced(model, ids, kind, most=6):
    """Models with one student each, in spans drawn from those where it may stand."""
    found = ss.find_spans(model, input_ids=ids).spans
    legal = [span for span in found if span.start.layout == span.stop.layout == "tokens"]
    if kind != "alone":  # in others, whose positions do not depend on earlier ones, it may look back as well
        legal = [span for span in legal if span.causal]
    if kind == "attention":
        legal = [span for span in legal if span.mask_obstacle is None]
    assert legal
    for k in sorted(np.random.default_rng(0).permutation(len(legal))[:most]):
        torch.manual_seed(1)
        student = STUDENTS[kind](legal[k].start.shape[1], legal[k].stop.shape[1])
        yield legal[k], ss.splice(model, {legal[k]: student}).eval()


def _written(model, ids, **given):
    with torch.no_grad():
        said = model.generate(
            input_ids=ids,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **given,
        )
    return said.sequences, torch.stack(said.logits)


def _same(one, other, span):
    assert torch.equal(one[0], other[0]), span.name
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-4, msg=span.name)


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "gemma", "gemma2", "gpt2", "gpt_neo", "phi", "opt", "falcon"]
)
def test_a_cache_changes_nothing(name, kind):
    model, ids = _model(name)
    for span, small in _spliced(model, ids, kind):
        _same(_written(small, ids, use_cache=False), _written(small, ids, use_cache=True), span)


@pytest.mark.parametrize("kind", STUDENTS)
def test_beams_and_padding_on_the_left(kind):
    model, ids = _model("llama")
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for span, small in _spliced(model, ids, kind, most=4):
        given = {"attention_mask": mask, "num_beams": 3}
        _same(_written(small, ids, use_cache=False, **given), _written(small, ids, **given), span)


@pytest.mark.parametrize("kind", STUDENTS)
def test_sliding_windows_shorter_than_the_text(kind):
    model, ids = _model(
        "qwen2", use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 3
    )
    for span, small in _spliced(model, ids, kind, most=4):
        _same(_written(small, ids, use_cache=False), _written(small, ids), span)
        if kind == "attention":  # takes tokens back again
            _written(small, ids[:1], prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_text_in_pieces_some_of_them_taken_back(kind):
    model, ids = _model("llama")
    for span, small in _spliced(model, ids, kind, most=4):
        with torch.no_grad():
            whole = small(ids, use_cache=False).logits
            first = small(ids[:, :5], use_cache=True)
            second = small(ids[:, 5:9], past_key_values=first.past_key_values)
            second.past_key_values.crop(-2)
            third = small(ids[:, 7:], past_key_values=second.past_key_values)
        got = torch.cat([first.logits, second.logits[:, :2], third.logits], 1)
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4, msg=span.name)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_cache_of_ones_own_and_none_after_it(kind):
    from transformers.cache_utils import DynamicCache

    model, ids = _model("llama")
    for span, small in _spliced(model.model, ids, kind, most=12):
        with torch.no_grad():
            whole = small(ids, use_cache=False)[0]
            cache = DynamicCache()
            first = small(ids[:, :5], past_key_values=cache)[0]
            second = small(ids[:, 5:], past_key_values=cache)[0]
            torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)
            for _ in range(2):  # whatever was cached before, and still is
                torch.testing.assert_close(small(ids)[0], whole, rtol=1e-4, atol=1e-4, msg=span.name)
            kept = small(ids)
            assert torch.equal(small(ids)[0], kept[0]), span.name


def test_the_inner_model_called_by_itself():
    model, ids = _model("llama")
    for kind in ("window", "attention", "any"):
        for span, small in _spliced(model, ids, kind, most=5):
            if span.stop.name.startswith("lm_head"):
                continue
            inner = small.model
            with torch.no_grad():
                whole = inner(ids, use_cache=False)[0]
                first = inner(ids[:, :5], use_cache=True)
                second = inner(ids[:, 5:9], past_key_values=first.past_key_values)
                third = inner(ids[:, 9:], past_key_values=second.past_key_values)
            got = torch.cat([first[0], second[0], third[0]], 1)
            torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4, msg=span.name)


def test_students_of_a_task_with_padding_on_the_left():
    """Masked rows make every position depend on all: students that attend are not causal by themselves."""
    model, ids = _model("llama")
    model.set_attn_implementation("eager")
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = ss.find_spans(model, input_ids=ids, attention_mask=mask)
    legal = [s for s in found.spans if not s.causal and s.start.layout == s.stop.layout == "tokens"]
    attends = [s for s in legal if s.mask_obstacle is None][:4]
    assert attends
    for span in attends:
        torch.manual_seed(1)
        student = AttentionStudent(span.start.shape[1], span.stop.shape[1], 2, 8, 16, causal=False)
        small = ss.splice(model, {span: student}).eval()
        given = {"attention_mask": mask}
        _same(_written(small, ids, use_cache=False, **given), _written(small, ids, **given), span)
        ahead = nn.Sequential(TokenWindows(1, 1), nn.Linear(3 * span.start.shape[1], span.stop.shape[1]))
        small = ss.splice(model, {span: ahead}).eval()
        with pytest.raises(ss.SpanError, match="may read later positions"):
            _written(small, ids, **given)


def test_the_encoder_is_given_all_tokens_every_time():
    model, _ = _model("bart")
    ids, some = torch.arange(24).view(2, 12), torch.arange(5, 15).view(2, 5)
    found = ss.find_spans(model, input_ids=ids, decoder_input_ids=some).spans
    legal = [s for s in found if not s.causal and s.start.layout == s.stop.layout == "tokens"]
    assert legal
    for span in legal[::5]:
        small = ss.splice(model, {span: Mean(span.start.shape[1], span.stop.shape[1])}).eval()
        with torch.no_grad():
            whole = small(input_ids=ids, decoder_input_ids=some, use_cache=False).logits
            first = small(input_ids=ids, decoder_input_ids=some[:, :3], use_cache=True)
            rest = small(input_ids=ids, decoder_input_ids=some[:, 3:], past_key_values=first.past_key_values)
        got = torch.cat([first.logits, rest.logits], 1)
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4, msg=span.name)


def test_a_cache_that_another_model_filled_is_refused():
    model, ids = _model("llama")
    with torch.no_grad():
        filled = model(ids[:, :5], use_cache=True).past_key_values
        for _, small in _spliced(model, ids, "window", most=2):
            with pytest.raises(ss.SpanError, match="Another model filled it"):
                small(ids[:, 5:], past_key_values=filled)


def test_a_cache_of_fixed_size_is_refused_where_it_would_be_wrong():
    model, ids = _model("llama")
    for kind, refused in (("alone", False), ("window", True)):
        for span, small in _spliced(model, ids, kind, most=2):
            if refused:
                with pytest.raises(ss.SpanError, match="use_cache=False"):
                    _written(small, ids, cache_implementation="static")
            else:
                found = _written(small, ids, cache_implementation="static")[0]
                assert torch.equal(found, _written(small, ids, use_cache=False)[0]), span.name


def test_members_of_a_study_write_the_same_with_a_cache_and_when_loaded_again(tmp_path):
    model, _ = _model("llama")
    draw = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 99, (8, 12), generator=draw)} for _ in range(12)]
    task = ss.Task(
        "tiny_llama",
        teacher=lambda: model,
        calibration=lambda: batches[:8],
        validation=lambda: batches[8:10],
        test=lambda: batches[10:],
        score=lambda model, batches: -float(sum(model(**b).logits.float().std() for b in batches)),
    )
    families = ("ridge", "attention", "thin", "truncated")
    fit = ss.FitSettings(steps=20, rates=(1e-3,), rate_steps=4, check_every=10)
    search = ss.Search(families=families, nested=False, seeds=8, fit=fit, polish=False)
    study = ss.Study(task, directory=tmp_path / "run", search=search, device="cpu")
    study.run(20)
    ids, seen = batches[0]["input_ids"][:2, :7], set()
    for member in study.front(y="divergence"):
        small = member.load()
        seen |= {splice.family for splice in member.splices}
        tokens, logits = _written(small, ids, use_cache=False)
        cached, cached_logits = _written(small, ids, use_cache=True)
        assert torch.equal(tokens, cached), member.splices
        torch.testing.assert_close(cached_logits, logits, rtol=1e-4, atol=1e-4)
        member.save(tmp_path / str(member.trial))
        again = ss.load(tmp_path / str(member.trial), model, **batches[0])
        with torch.no_grad():
            assert torch.equal(again(ids).logits, small(ids).logits)
        with pytest.raises(OSError, match="no file named"):  # it does not pass for a plain model
            type(model).from_pretrained(tmp_path / str(member.trial))
    assert len(seen) > 1
