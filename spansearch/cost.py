"""What a forward pass costs: multiply-adds counted as torch counts them, and the distinct parameters.

The formulas are those of `torch.utils.flop_counter`; one that the user registers there with
`register_flop_formula` counts too. Added are operators that torch silently counts as zero: attention fused on
CPU, fused recurrent layers, products with vectors, bilinear forms. What still escapes is named.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from spansearch.errors import FamilyError, TaskError

NO_NODE = -1  # the key in FlopTally.by_node of work that makes no autograd node


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
        storage = _storage(parameter)
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


@contextmanager
def countable() -> Iterator[None]:
    """Make attention visible to a counter: no fused `scaled_dot_product_attention`, no transformer fast path.

    Both are process-wide flags of torch, put back on exit. Results may differ in the last bits.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class FlopTally(TorchDispatchMode):
    """While active, count the flops of every operator and say which autograd node each belongs to.

    Use it inside `countable()`, or transformer layers on the fast path are named in `uncounted`, not counted.
    Nested tensors are not supported.

    Attributes:
        total: flops so far, over the whole batch, 2 per multiply-add.
        by_node: `tensor.grad_fn._sequence_nr()` -> flops of the operator that made the tensor; sums to total.
            The number is unique within a thread. Under NO_NODE is work on inputs none of which requires grad.
            Work inside a custom `autograd.Function` is under its node; any other work done while grad is off
            falls to whichever node was made last, so keep grad on where by_node matters.

    Args:
        weights: tensors to treat as parameters: copies that a functional call swaps in, buffers that hold
            weights. `nn.Parameter` objects are recognised by themselves.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.total = 0
        self.by_node: dict[int, int] = {}
        self._names: set[str] = set()
        # Weak references keep no memory alive, yet keep a freed address from passing to an activation.
        self._weights = {_storage(weight) for weight in weights} - {None}

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Sorted names of the operators so far that attend or read a parameter matrix but have no formula."""
        return tuple(sorted(self._names))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        whole = isinstance(func, torch._ops.HigherOrderOperator)  # a loop, a branch: its body stays unseen
        packet = func if whole else func._overloadpacket
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None and not whole:
            with self:  # in inference mode composite operators arrive whole; their parts have the formulas
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        suspect = whole or self._reads_weights(func, inputs, out)
        if formula is not None:
            self._add(formula(*args, **kwargs, out_val=out), inputs)
        elif suspect:
            self._names.add(func.name() if whole else func._schema.name)
        return out

    def _add(self, flops: int, inputs: list[Tensor]) -> None:
        # Autograd makes and numbers the node just before it dispatches the operator, unless no input requires
        # grad. The forward of a custom Function runs with grad off, after its node was made.
        no_node = torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in inputs)
        node = NO_NODE if no_node else torch._C._autograd._get_sequence_nr() - 1
        self.total += flops
        self.by_node[node] = self.by_node.get(node, 0) + flops

    def _reads_weights(self, func: Any, inputs: list[Tensor], out: Any) -> bool:
        """Whether func may multiply by a weight matrix, or attends; remembers what weights alone make."""
        weights = [t for t in inputs if isinstance(t, nn.Parameter) or _storage(t) in self._weights]
        if weights and len(weights) == len(inputs):
            # Casts, transposes, masks, weight norms: the result is a weight itself, made once for all
            # examples and in time linear in its size, except by factorisations and matrix functions.
            self._weights.update({_storage(t) for t in tree_leaves(out) if isinstance(t, Tensor)} - {None})
            return "linalg" in func._opname and "norm" not in func._opname
        if not any(weight.dim() >= 2 for weight in weights):
            return "attention" in func._opname
        return torch.Tag.pointwise not in func.tags and func._opname.rstrip("_") not in _NO_PRODUCT


# Operators that read a matrix without multiplying by it: they copy, look up or scale.
_NO_PRODUCT = frozenset(
    """cat stack copy embedding _embedding_bag _embedding_bag_forward_only index _unsafe_index index_select
    index_put _unsafe_index_put _index_put_impl index_add index_copy gather take scatter scatter_add
    masked_scatter slice_scatter select_scatter bucketize searchsorted grid_sampler_2d grid_sampler_3d
    native_layer_norm _fused_rms_norm _prelu_kernel""".split()  # noqa: SIM905
)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    # (.., Tq, d) @ (.., d, Tk), then (.., Tq, Tk) @ (.., Tk, dv). As in torch a causal mask saves nothing.
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(x: Tensor, matrices: Iterable[Tensor]) -> int:
    # x (T, N, in). Each step applies each matrix once: input, hidden and projection, with all gates stacked.
    return 2 * prod(x.shape[:-1]) * sum(weight.numel() for weight in matrices if weight.dim() == 2)


def _bilinear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    # x (N, in1) with weight (out, in1, in2), then that (N, out, in2) with y (N, in2).
    return 2 * x.shape[0] * (weight.numel() + weight.shape[0] * weight.shape[2])


_ADDED: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "mkldnn_rnn_layer": lambda x, *rest, **_: _recurrent(x, rest[:4]),  # the states follow
    "_cudnn_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "miopen_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "_trilinear": _bilinear,
    "mv": lambda matrix, *_, **__: 2 * matrix.numel(),
    "addmv": lambda _self, matrix, *_, **__: 2 * matrix.numel(),
    "dot": lambda vector, *_, **__: 2 * vector.numel(),
    "addbmm": lambda _self, left, right, *_, **__: 2 * left.numel() * right.shape[-1],
}
# Not every release of torch has every operator.
_FORMULAS = {getattr(torch.ops.aten, k): v for k, v in _ADDED.items() if hasattr(torch.ops.aten, k)}


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


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse, for one, has none
        return None


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
