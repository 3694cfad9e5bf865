"""One real forward pass, watched: which module calls make and read which activations, what flows where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.flop_tally import FlopTally, countable
from spansearch.spans.conventions import MaskWatch
from spansearch.spans.copying import copy_model
from spansearch.spans.graph import Activation, Call, Flow, Key, Leaf, Recording, Trace, place_calls
from spansearch.spans.inputs import Inputs
from spansearch.spans.randomness import fixed_random
from spansearch.spans.structure import flatten


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], train: bool = False) -> Trace:
    """Run a copy of the model once and return the graph of its activations.

    Args:
        model: the model; not modified, not even its batch-norm statistics.
        args, kwargs: one real input; examples along dimension 0 of its first tensor.
        train: run in train mode instead of eval mode. Random numbers are the same every time and restored.

    Raises:
        SpanError: the model fails on the input, has no tensor input, or no differentiable path leads from
            its input to its output.
    """
    copied = copy_model(model).train(train).requires_grad_(False)
    inputs = Inputs(args, kwargs)
    tally = FlopTally(copied.buffers())
    watch = None if train else MaskWatch(inputs.batch_size)
    recorder = _Recorder(tally, watch)
    handles = recorder.watch(copied)
    try:
        with (
            fixed_random(),
            torch.enable_grad(),
            countable(),
            _structure_only(),
            inputs.flow(),
            tally,
        ):
            copied(*inputs.args, **inputs.kwargs)
    except Exception as error:
        mode = "train" if train else "eval"
        raise SpanError(
            f"{type(model).__name__} failed in {mode} mode on the example input: {type(error).__name__}: "
            f"{error}. spansearch runs the model once on a real example. Pass the arguments the model is "
            "called with."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    traced = _finish(recorder, inputs, tally, type(model).__name__)
    if watch is not None:
        traced.masks = watch.find_out(copied)
    return traced


@contextmanager
def _structure_only() -> Iterator[None]:
    """Autograd keeps its graph but none of the tensors it would save for a backward pass."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
        yield


def _finish(recorder: _Recorder, inputs: Inputs, tally: FlopTally, name: str) -> Trace:
    recording = recorder.recording
    sources = [(id(node), output) for node, output in inputs.sources]
    flow = Flow(recording, sources)
    if flow.graph is None:
        raise SpanError(
            f"No differentiable path leads from {name}'s input to its output{recorder.where_lost()}: "
            "autograd is blind there. A trunk under torch.no_grad(), a detach() or an integer output hides "
            "the graph. Remove the no_grad for tracing."
        )
    place_calls(recording, flow)
    activations = {
        flow.vertices[key]: Activation(flow.vertices[key], shape, dtype, view)
        for key, (shape, dtype, view) in recording.tensors.items()
        if key in flow.vertices
    }
    flops = {v: tally.by_node[number] for v, number in flow.numbers.items() if number in tally.by_node}
    return Trace(
        flow.graph,
        recording.calls,
        recording.counts,
        activations,
        flow.names,
        flow.numbers,
        flops,
        tally.total,
        tally.uncounted,
        inputs.batch_size,
        flow.vertices.get(sources[0]) if inputs.single else None,
        tuple(recording.beside),
    )


class _Recorder:
    """Hooks on every module that write down its calls."""

    def __init__(self, tally: FlopTally, masks: MaskWatch | None) -> None:
        self.tally, self.masks = tally, masks
        self.recording = Recording()
        self.open: list[int] = []
        self.lost: list[str] = []  # modules that read what autograd follows and return what it does not
        self.seen: list[str] = []  # modules that return what autograd follows
        # identities of tensors that it does not follow: kept alive, and the call that returned each first, -1
        # where it was read before
        self.loose: dict[int, tuple[Tensor, int]] = {}

    def watch(self, model: nn.Module) -> list[Any]:
        """Hook into a model; returns the handles."""
        handles = []
        for path, module in model.named_modules():
            before, after = self._hooks(path, isinstance(module, nn.Sequential))
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        return handles

    def where_lost(self) -> str:
        """In which module autograd loses the path, for an error message."""
        if self.lost:
            return f" (it is lost in {self.lost[0]})"
        return f" (it is lost after {self.seen[-1]})" if self.seen else ""

    def _hooks(self, path: str, container: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        recording = self.recording

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            number = recording.counts.get(path, 0)
            recording.counts[path] = number + 1
            parent = self.open[-1] if self.open else -1
            first_node = torch._C._autograd._get_sequence_nr()
            self.open.append(len(recording.calls))
            recording.calls.append(
                Call(path, number, parent, first_node, flops=self.tally.total, container=container)
            )
            leaves = flatten((args, kwargs))[0]
            read = self._read(leaves)
            for leaf in _loose(leaves):
                maker = self.loose.setdefault(id(leaf), (leaf, -1))[1]
                if maker >= 0:
                    recording.beside[maker, len(recording.calls) - 1] = None
            recording.keys.append((read, {}))
            if self.masks is not None:
                self.masks.look(len(recording.calls) - 1, path, module, (args, kwargs), list(read))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            index = self.open.pop()
            call = recording.calls[index]
            call.last_node = torch._C._autograd._get_sequence_nr()
            call.flops = self.tally.total - call.flops
            leaves, call.structure = flatten(output)
            call.leaves = tuple(_describe(leaf) for leaf in leaves)
            given = {id(leaf): i for i, leaf in enumerate(flatten((args, kwargs))[0])}
            call.handed = {
                i: given[id(leaf)]
                for i, leaf in enumerate(leaves)
                if isinstance(leaf, Tensor) and id(leaf) in given
            }
            for leaf in _loose(leaves):
                self.loose.setdefault(id(leaf), (leaf, index))
            read, made = recording.keys[index][0], self._read(leaves)
            recording.keys[index] = (read, made)
            if made and path:
                self.seen.append(path)
            elif read and not made and path and any(isinstance(leaf, Tensor) for leaf in leaves):
                self.lost.append(path)
            if call.parent < 0:
                recording.output_keys.update(dict.fromkeys(made.values()))

        return before, after

    def _read(self, leaves: list[Any]) -> dict[int, Key]:
        found = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                key = (id(leaf.grad_fn), leaf.output_nr)
                self.recording.functions[key[0]] = leaf.grad_fn
                self.recording.tensors.setdefault(key, (tuple(leaf.shape), leaf.dtype, leaf._is_view()))
                found[i] = key
        return found


def _loose(leaves: list[Any]) -> Iterator[Tensor]:
    """The tensors that autograd does not follow."""
    return (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is None)


def _describe(leaf: Any) -> Leaf:
    if isinstance(leaf, Tensor):
        return Leaf(tuple(leaf.shape), leaf.dtype)
    return Leaf(None, None, leaf if isinstance(leaf, int | float | str | bool) else None)
