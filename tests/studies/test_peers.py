"""The benchmark against other tools: accounts, what selects, the summary, each method on a tiny CNN."""

import json
import sys
from pathlib import Path

import pytest
import tasks
import torch
from click.testing import CliRunner
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from benchmarks import peer_methods, peer_runs, peers
from benchmarks.distil import Budget, distilled, with_targets
from benchmarks.peer_methods import BlockDropping, FromScratch, Ours, Pruned, Unreachable, first_that
from benchmarks.peer_runs import Race, Way
from benchmarks.peers_report import markdown, summarise
from benchmarks.records import Records
from benchmarks.setting import Setting


@pytest.fixture
def setting(tmp_path):
    task = tasks.make("cnn")
    return Setting(
        "cnn", 0, task, Records(tmp_path / "some.jsonl"), tmp_path, tasks.quick(families=("ridge",))
    )


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    def made(width, blocks):
        return tasks.TinyCNN(max(1, round(8 * width)), blocks)

    monkeypatch.setitem(peer_methods.THINNER, "cnn", made)


class Given:
    """A method whose networks are given; its variants are their names."""

    untrained = False

    def __init__(self, models, name="given", seconds=0.0):
        self.models, self.name, self.seconds = models, name, seconds

    def variants(self):
        return list(self.models)

    def prune(self, variant, target):
        if self.models[variant] is None:
            raise Unreachable
        return Pruned(self.models[variant], self.seconds)


class Paid(Given):
    """Stands for spansearch."""

    trials = 3
    job = None


def race(setting, peer, steps=4, polish=2.0, ours=None):
    teacher = setting.bench.teacher
    return Race(setting, ours or Paid({"closed form": teacher}, "spansearch", 30.0), [peer], steps, polish)


def test_a_budget_of_steps_and_one_of_seconds():
    steps = Budget(40)
    assert steps.share(0.25).steps == 10 and steps.share(1e-6).steps == 1
    assert steps.less(1e9) == steps
    assert [steps.spent(n, 1e9) for n in (0, 10, 40)] == [0, 0.25, 1]
    seconds = Budget(seconds=8.0)
    assert seconds.share(0.25).seconds == 2 and seconds.less(3).seconds == 5 and seconds.less(9).seconds == 0
    assert seconds.spent(1, 4.0) == 0.5 and seconds.less(9).spent(0, 0.0) == 1
    assert seconds and not seconds.less(9)


def test_distillation_stops_when_its_budget_is_spent(setting):
    examples = with_targets(setting.task, setting.bench.teacher)
    start = tasks.TinyCNN()
    ticks = iter(range(100))
    clocked = Budget(seconds=5.0, clock=lambda: next(ticks))

    def trained(budget):
        return distilled(setting.task, start, examples, "kl", budget, 1e-2, 0)

    assert trained(Budget(7)).steps == 7
    assert not torch.equal(trained(Budget(1)).model.head.weight, start.head.weight)
    assert trained(Budget(seconds=1.0, clock=lambda: next(ticks))).steps == 1
    assert trained(clocked).steps == 4  # a tick at the start and one before every step
    none = trained(Budget(seconds=0.0))
    assert none.steps == 0 and torch.equal(none.model.head.weight, start.head.weight)
    assert setting.bench.validation.divergence(trained(Budget(60)).model) < 0.5 * (
        setting.bench.validation.divergence(none.model)
    )


def test_frozen_norms_keep_their_statistics(setting):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    examples = with_targets(setting.task, setting.bench.teacher)
    before = model[1].running_mean.clone()
    for frozen in (True, False):
        found = distilled(setting.task, model, examples, "kl", Budget(2), 1e-3, 0, frozen=frozen).model
        assert torch.equal(found[1].running_mean, before) == frozen
        assert not torch.equal(found[0].weight, model[0].weight)


def test_the_compute_of_a_point(setting):
    ours = Paid({"closed form": setting.bench.teacher}, "spansearch", 10.0)
    found = race(setting, Given({}), polish=2.0, ours=ours)
    assert found.compute.seconds == pytest.approx(30 / 3)
    assert found.compute.less(10 / 3).seconds == pytest.approx(20 / 3)  # what our own polish of a point gets
    found.grant = 0.1
    assert found.compute.seconds == pytest.approx(1)


def worse(setting, amount):
    model = tasks.TinyCNN()
    model.load_state_dict(setting.bench.teacher.state_dict())
    with torch.no_grad():
        model.head.weight += amount * torch.randn(
            model.head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    return model.eval()


def test_validation_selects_and_test_is_looked_at_once(setting, monkeypatch):
    peer = Given({"bad": worse(setting, 0.5), "good": worse(setting, 0.1), "none": None})
    real, seen = setting.bench.test.divergence, []
    monkeypatch.setattr(setting.bench.test, "divergence", lambda model: seen.append(model) or real(model))
    here = race(setting, peer)
    plain = here.measure(peer, 0.5, "plain")
    assert plain["variant"] == "good" and len(seen) == 1
    assert plain["validation"] == setting.bench.validation.divergence(peer.models["good"])
    monkeypatch.setattr(
        here, "train", lambda start, way, budget: peer_runs.Distilled(peer.models["bad"], 1, 2.0)
    )
    kept = here.measure(peer, 0.5, "steps")
    assert (kept["kept"], kept["variant"], kept["test"]) == ("before", "good", plain["test"]) and len(
        seen
    ) == 2


def test_the_range_test_finds_the_way(setting, monkeypatch):
    """Networks say where they come from; the divergence says which way is best."""
    here = race(setting, Given({}), steps=100)
    candidates = {name: Pruned(name, 0.0) for name in ("a", "b", "c")}
    shares = []

    def train(start, way, budget):
        shares.append(budget.steps)
        return peer_runs.Distilled(way, 0, 0.0)

    def divergence(way):
        return (way.variant != "b") + abs(way.rate - 3e-3)

    monkeypatch.setattr(here, "train", train)
    monkeypatch.setattr(here, "divergence", divergence)
    way, tried = here.tuned(candidates, Budget(100))
    assert way == Way("b", 3e-3, False)  # no batch norms to freeze
    rates = len(peer_runs.RATES)
    assert shares == [5] * (3 + 2 * rates) + [15] * peer_runs.FINALISTS and len(tried) == len(shares)


def test_no_network_of_the_size_is_a_failure_on_record(setting):
    job = race(setting, Given({"none": None})).jobs(("plain",))[-1]
    assert "no network" in setting.carry_out(job)["failed"]


def test_the_first_that_fits():
    assert [first_that(lambda n, k=k: n >= k, 1, 9) for k in (0, 1, 5, 9)] == [1, 1, 5, 9]
    with pytest.raises(Unreachable):
        first_that(lambda n: False, 1, 9)


@pytest.mark.parametrize("make", [FromScratch, BlockDropping])
def test_a_method_without_a_library_meets_its_targets(setting, make):
    method, before = make(setting), {k: v.clone() for k, v in setting.bench.teacher.state_dict().items()}
    ratios = []
    for target in peer_methods.TARGETS:
        pruned = method.prune(method.variants()[0], target)
        ratios.append(peer_methods.flops_ratio(setting, pruned.model))
        assert ratios[-1] <= target + peer_methods.TOLERANCE and pruned.seconds >= 0
    assert ratios == sorted(ratios, reverse=True)
    assert all(torch.equal(v, before[k]) for k, v in setting.bench.teacher.state_dict().items())
    with pytest.raises(Unreachable):
        method.prune(method.variants()[0], -1)


def test_our_front_is_run_once_and_its_best_member_taken(setting):
    ours = Ours(setting, trials=6)
    pruned = ours.prune("closed form", 0.75)
    fitting = [m for m in ours._study.front(y="divergence") if m.measures.flops_ratio <= 0.76]
    least = min(m.measures.divergence for m in fitting)
    assert setting.bench.validation.divergence(pruned.model) == pytest.approx(least, rel=1e-4)
    assert pruned.seconds == ours.seconds / 3 > 0
    assert Ours(setting, trials=6).seconds == ours.seconds  # from the record
    with pytest.raises(Unreachable):
        ours.prune("closed form", -1)


def record(family, test, score, regime="compute", size=50, seed=0, **more):
    return {
        "kind": "peer",
        "teacher": "cnn",
        "seed": seed,
        "family": family,
        "size": size,
        "init": regime,
        "variant": "some",
        "validation": test,
        "test": test,
        "score": score,
        "seconds": 1.0,
        "flops_ratio": size / 100,
        **more,
    }


def test_the_answers_by_hand():
    records = [
        {"kind": "teacher", "teacher": "cnn", "seed": 0, "score": 0.8},
        {"kind": "front", "teacher": "cnn", "seed": 0, "seconds": 9.0, "trials": 7},
        record("spansearch", 2.0, 0.7, rate=1e-3, frozen=True, steps=9, kept="after"),
        record("spansearch", 4.0, 0.6, "plain"),
        record("one", 8.0, 0.9, validation=99.0),
        record("two", 10.0, 0.65),
        record("two", 1.0, 0.65, size=25),  # nothing of ours to compare it with
        record("spansearch", 8.0, 0.7, seed=1),
        record("one", 8.0, 0.6, seed=1),
        {**record("three", 0, 0), "failed": "ImportError: no"},
    ]
    answers = summarise(records)
    ratio = answers["ratios"]["compute"][50]
    assert ratio["mean"] == pytest.approx((2 / 8 * 8 / 8) ** 0.5)
    assert (ratio["low"], ratio["high"], ratio["seeds"]) == (0.25, 1.0, 2)
    assert answers["ratios"]["closed form"] == {50: {"mean": 0.5, "low": 0.5, "high": 0.5, "seeds": 1}}
    assert "plain" not in answers["ratios"] and 25 not in answers["ratios"]["compute"]
    assert answers["gains"]["compute"][50] == pytest.approx(0.7 - 0.9)
    assert answers["kept"] == {50: pytest.approx(0.75)}
    page = markdown({"command": "x", "date": "y", "versions": {}, "settings": {}, "answers": answers})
    assert "not run: ImportError: no" in page and "| <= 0.15 |" in page and "frozen norms" in page
    empty = {"command": "x", "date": "y", "versions": {}, "settings": {}, "answers": summarise([])}
    assert "Not measured." in markdown(empty)


def test_the_command_measures_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "task", lambda name, seed, cache: tasks.make("cnn", seed))
    monkeypatch.setattr(peers, "FAMILIES", ("ridge",))
    monkeypatch.setattr(peer_runs, "RATES", (1e-3,))
    command = ["--seeds", "0", "--peers", "scratch", "blocks", "--trials", "6", "--steps", "3"]
    command += ["--out", str(tmp_path / "peers.json"), "--cache", str(tmp_path), "--grant", "0.02"]

    def invoke():
        return CliRunner().invoke(peers.main, command, catch_exceptions=False)

    result = invoke()
    assert result.exit_code == 0, result.output
    answers = json.loads((tmp_path / "peers.json").read_text())["answers"]
    assert not answers["failed"]
    assert len(answers["points"]) == 3 * (2 + 3 + 3)  # nothing to see of what is not trained
    assert set(answers["ratios"]) == {"plain", "steps", "compute", "closed form"}
    lines = (tmp_path / "peers.jsonl").read_text().splitlines()
    monkeypatch.setattr(Race, "measure", lambda *args: pytest.fail("measured again"))
    assert invoke().exit_code == 0
    again = (tmp_path / "peers.jsonl").read_text().splitlines()
    assert set(again) == set(lines)
    assert "closed form" in (tmp_path / "peers.md").read_text()


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(peers.main, ["--out", str(tmp_path / "peers.json")])
    assert result.exit_code == 1
    assert "torch-pruning, modelopt" in result.output and "'.[peers]'" in result.output
    assert not list(tmp_path.iterdir())


def test_a_library_that_does_not_load_is_on_record(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.peer_modelopt", None)
    broken = peers.method("modelopt", setting)
    job = race(setting, broken).jobs(("plain",))[-1]
    assert (
        "ImportError" in setting.carry_out(job)["failed"]
        or "ModuleNotFound" in setting.carry_out(job)["failed"]
    )


@pytest.mark.filterwarnings("ignore")
def test_torch_pruning(setting):
    pytest.importorskip("torch_pruning")
    method = peers.method("torch-pruning", setting)
    variants = method.variants()
    assert len(variants) == 8  # no batch norms here
    for variant in variants:
        pruned = method.prune(variant, 0.5)
        assert 0.2 < peer_methods.flops_ratio(setting, pruned.model) <= 0.51
        assert setting.bench.validation.divergence(pruned.model) > 0
    assert all(p.grad is None for p in setting.bench.teacher.parameters())


@pytest.mark.filterwarnings("ignore")
def test_fastnas(setting):
    pytest.importorskip("modelopt")
    method = peers.method("modelopt", setting)
    pruned = method.prune("multiples of 4", 0.75)
    assert peer_methods.flops_ratio(setting, pruned.model) <= 0.76 and pruned.seconds > 0
    assert setting.bench.validation.divergence(pruned.model) > 0
    with pytest.raises(Unreachable):
        method.prune("multiples of 4", 0.1)
