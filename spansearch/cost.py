"""What a forward pass costs: multiply-adds of one example (flop_tally.py), and the distinct parameters."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.bare import uncompiled
from spansearch.errors import FamilyError, TaskError
from spansearch.flop_tally import FlopTally, countable, storage_of


@dataclass(frozen=True)
class Cost:
    """What one example costs.

    Attributes:
        flops: of one forward pass of ONE example, 2 per multiply-add.
        params: number of elements of the distinct parameters, tied ones counted once.
        latency_s: seconds for one forward pass where somebody measured it, else None.
        uncounted: sorted names (`namespace::operator`) of operators that attend or read a parameter matrix
            but have no formula. If there are any, flops is a lower bound.
    """

    flops: int
    params: int
    latency_s: float | None = None
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlopCount:
    """What a run did: flops over the WHOLE batch, 2 per multiply-add; uncounted as in `Cost`."""

    flops: int
    uncounted: tuple[str, ...] = ()


def cost(model: nn.Module, *args: Any, **kwargs: Any) -> Cost:
    """Count what one example costs: runs `model(*args, **kwargs)` once, without grad, in its current mode.

    The number of examples N is the leading dimension of the first tensor that has one, among args, then
    kwargs, inside lists, tuples and mappings too. (A model that takes (T, N, C) gets its cost per time step.)
    Work that does not grow with N, e.g. a product of two parameters, is shared evenly and the quotient is
    rounded UP; otherwise the division is exact and N does not matter.

    Training flags, buffers (also batch-norm statistics in train mode), torch's random number generators and
    backend flags are left as they were. Python attributes that a forward writes stay written.

    Args:
        model: any module, on any device, meta included.
        *args, **kwargs: what it is called with. Some tensor in there has shape (N, ...), N >= 1.

    Returns:
        Cost: flops of one example, params of the model, uncounted; latency_s is None.

    Raises:
        TaskError: no tensor with a leading dimension among the arguments, or N = 0.

    Attention is not fused while counting, so its (N, heads, T, T) scores take memory: N = 1 is enough.
    """
    model = uncompiled(model)  # whose operators are seen one by one
    examples = _examples((args, kwargs))
    with torch.no_grad(), _buffers_kept(model):
        # Buffers as well: quantised and frozen random weights live there.
        count = count_flops(lambda: model(*args, **kwargs), weights=model.buffers())
    return Cost(-(-count.flops // examples), parameter_count(model), uncounted=count.uncounted)


def announce(
    build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Cost:
    """Count what a module will cost before it exists, on the meta device and in eval mode.

    Equals `cost` of the built module in eval mode on any input (N, *shape). Takes no memory for parameters or
    activations, draws no random numbers. A copy is run, so what `build` returns may be in use elsewhere.

    Args:
        build: makes the module; called once, with meta as the default device.
        shape: of one example, without the batch dimension.
        dtype: of the input.

    Returns:
        Cost: as from `cost`.

    Raises:
        FamilyError: the module cannot be run on a meta input of that shape.
    """
    with _generators_kept(), torch.device("meta"), torch.no_grad():
        student = build()
        # To deepcopy the tensors are copied already: nothing large is, and tied ones stay tied.
        tensors = chain(student.parameters(), student.buffers())
        ghost = copy.deepcopy(student, {id(tensor): _without_values(tensor) for tensor in tensors}).eval()
        x = torch.empty((1, *shape), dtype=dtype)
        try:
            count = count_flops(lambda: ghost(x), weights=ghost.buffers())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise FamilyError(
                f"announce: expected a module that runs on a meta input of shape {tuple(x.shape)}, got "
                f"{type(student).__name__}, which raised {type(error).__name__}: {error}. Costs are counted "
                "before anything is trained, on tensors without values. Make its forward fit this shape, "
                "read no values (item(), numpy()) and create tensors on its input's device."
            ) from error
    return Cost(count.flops, parameter_count(student), uncounted=count.uncounted)


def parameter_count(model: nn.Module) -> int:
    """Number of elements of the distinct parameters; tied ones, by object or by shared memory, count once."""
    distinct: dict[Any, int] = {}
    for parameter in model.parameters():
        storage = storage_of(parameter)
        place = storage and (storage, parameter.storage_offset(), parameter.shape, parameter.stride())
        distinct[place or id(parameter)] = parameter.numel()
    return sum(distinct.values())


def count_flops(run: Callable[[], object], weights: Iterable[Tensor] = ()) -> FlopCount:
    """Count the flops of whatever `run()` does, over the whole batch, under `countable()`.

    Grad mode is the caller's: a backward pass inside `run` is counted too. Torch's random number generators
    are put back afterwards.

    Args:
        run: called once; what it returns is dropped.
        weights: as for `FlopTally`.
    """
    with _generators_kept(), countable(), FlopTally(weights) as tally:
        run()
    return FlopCount(tally.total, tally.uncounted)


def _examples(arguments: Any) -> int:
    shape = next((tuple(tensor.shape) for tensor in _tensors(arguments) if tensor.dim()), None)
    if shape and shape[0] > 0:
        return shape[0]
    raise TaskError(
        "cost: expected a tensor of shape (N, ...) with N >= 1 among the arguments, got "
        f"{f'{shape} as the first shape' if shape else 'none'}. The cost of one example is that of the batch "
        "divided by N. Pass the input as a tensor with a leading batch dimension that is not 0."
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        items = value.values() if isinstance(value, Mapping) else value
        yield from chain.from_iterable(map(_tensors, items))


def _without_values(tensor: Tensor) -> Tensor:
    ghost = torch.empty_like(tensor, device="meta")
    return nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost


@contextmanager
def _generators_kept() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in kept:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            # Written only if changed: a write would invalidate graphs that saved the buffer for backward.
            if not buffer.is_meta and not torch.equal(buffer, before):
                buffer.copy_(before)
