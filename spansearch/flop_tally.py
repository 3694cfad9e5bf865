"""Multiply-adds, counted as torch counts them while operators run.

The formulas are those of `torch.utils.flop_counter`; one that the user registers there with
`register_flop_formula` counts too. Added are operators that torch silently counts as zero: attention fused on
CPU, fused recurrent layers, products with vectors, bilinear forms. What still escapes is named.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NO_NODE = -1  # the key in FlopTally.by_node of work that makes no autograd node


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
        self._weights = {storage_of(weight) for weight in weights} - {None}

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
        if func.namespace.startswith("quantized"):  # their weights are packed, no tensors
            return True
        weights = [t for t in inputs if isinstance(t, nn.Parameter) or storage_of(t) in self._weights]
        if weights and len(weights) == len(inputs):
            # Casts, transposes, masks, weight norms: the result is a weight itself, made once for all
            # examples and in time linear in its size, except by factorisations and matrix functions.
            self._weights.update({storage_of(t) for t in tree_leaves(out) if isinstance(t, Tensor)} - {None})
            return "linalg" in func._opname and "norm" not in func._opname
        if not any(weight.dim() >= 2 for weight in weights):
            return "attention" in func._opname
        return torch.Tag.pointwise not in func.tags and func._opname.rstrip("_") not in _NO_PRODUCT


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """The memory a tensor lies in, held weakly; None where it has none."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse, for one, has none
        return None


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
