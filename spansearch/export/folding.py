"""Batch norm and linear maps folded into the layer in front of them, in the graph of an exported program."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten: Any = torch.ops.aten
CONVOLUTIONS = {
    overload
    for of in (aten.conv1d, aten.conv2d, aten.conv3d)
    for overload in (of.default, of.padding)  # padding: given as "same" or "valid"
}
LINEAR = aten.linear.default
COPIES = {aten.clone.default, aten.alias.default, aten.contiguous.default}
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default}


class Folded(NamedTuple):
    """How many layers were folded away."""

    norms: int = 0
    linear: int = 0


NOTHING = Folded()


def fold_norms(module: GraphModule) -> int:
    """Fold every batch norm in eval mode into the convolution or linear layer in front of it, in place.

    Exact up to rounding: y * scale + shift by channel is a linear map of what that layer computes. Only where
    nothing else reads the layer's output, and its weight belongs to that layer alone.

    Returns:
        How many were folded.
    """
    return _fold(module, _without_norm)


def fold_linear(module: GraphModule) -> int:
    """Fold every linear layer into a linear layer right in front of it, in place; 1 x 1 convolutions as well.

    Only where that makes no more weights than there were: two thin layers stay two. A 1 x 1 convolution goes
    into a convolution of any size in front of it, as it reads no neighbours; conditions as for norms.

    Returns:
        How many were folded.
    """
    return _fold(module, _without_second)


class _Layer(NamedTuple):
    """A linear layer or convolution in a graph; weight (out, in, ...), bias (out,), both float64."""

    node: Node
    weight: Tensor
    bias: Tensor


def _fold(module: GraphModule, replacement: Any) -> int:
    uses = _uses(module)
    count = 0
    for node in list(module.graph.nodes):
        found = replacement(module, node, uses)
        if found is not None:
            _replace(module, node, found, count)
            count += 1
    if count:
        _clean(module)
    return count


def _without_norm(module: GraphModule, node: Node, uses: Counter[int]) -> _Layer | None:
    """The layer in front of a batch norm with the norm in its weights; None where there is none to fold."""
    if node.target is not aten.batch_norm.default:
        return None
    arguments: Any = node.args
    x, weight, bias, mean, variance, training, _, epsilon, _ = arguments
    layer = _layer(module, _source(x), uses)
    if layer is None or training or mean is None or variance is None:
        return None
    if layer.node.target is LINEAR and layer.node.meta["val"].ndim != 2:
        return None  # its channels are the last dimension, the norm's are dimension 1
    scale = (_value(module, variance) + epsilon).rsqrt()
    scale = scale if weight is None else scale * _value(module, weight)
    shift = (layer.bias - _value(module, mean)) * scale
    shift = shift if bias is None else shift + _value(module, bias)
    return _Layer(layer.node, layer.weight * scale.view(-1, *(1,) * (layer.weight.ndim - 1)), shift)


def _without_second(module: GraphModule, node: Node, uses: Counter[int]) -> _Layer | None:
    """The layer in front of a linear one as the product of both; None where there is none to fold."""
    second = _layer(module, node, uses)
    first = _layer(module, _source(node.args[0]), uses) if second is not None else None
    if first is None or second is None or not _is_product(first, second):
        return None
    matrix = second.weight.flatten(1)
    weight = (matrix @ first.weight.flatten(1)).view(len(matrix), *first.weight.shape[1:])
    if weight.numel() > first.weight.numel() + second.weight.numel():
        return None
    return _Layer(first.node, weight, matrix @ first.bias + second.bias)


def _is_product(first: _Layer, second: _Layer) -> bool:
    """Is the second layer a linear map of the first one's output at each position?"""
    if first.node.target is LINEAR or second.node.target is LINEAR:
        return first.node.target is second.node.target
    stride, padding, _, groups = _convolution(second.node)
    pointwise = all(size == 1 for size in second.weight.shape[2:]) and set(stride) == {1}
    return (
        pointwise
        and padding in ("same", "valid", *([0] * n for n in (1, 2, 3)))
        and groups == 1 == _convolution(first.node)[3]
    )


def _convolution(node: Node) -> tuple[Any, Any, Any, int]:
    """Stride, padding, dilation and groups, which a graph leaves out where they are the default."""
    dimensions = node.meta["val"].ndim - 2
    usual: list[Any] = [[1] * dimensions, [0] * dimensions, [1] * dimensions, 1]
    given = list(node.args[3:])
    stride, padding, dilation, groups = given + usual[len(given) :]
    padding = padding if isinstance(padding, str) else list(padding)
    return list(stride) * (dimensions if len(stride) == 1 else 1), padding, dilation, groups


def _source(node: Any) -> Node | None:
    """What computes a value that one node alone reads, behind copies of it and dropout that does nothing."""
    while isinstance(node, Node) and len(node.users) == 1:
        off = node.target in DROPOUTS and node.args[2] is False
        if not (off or node.target in COPIES):
            return node
        node = node.args[0]
    return None


def _layer(module: GraphModule, node: Node | None, uses: Counter[int]) -> _Layer | None:
    """A node's layer; None where it is none, or its weight is computed or has other uses."""
    if node is None or (node.target is not LINEAR and node.target not in CONVOLUTIONS):
        return None
    _, weight, *rest = node.args
    bias = rest[0] if rest else None
    own = [one for one in (weight, bias) if one is not None]
    if node.kwargs or any(not isinstance(one, Node) or one.op != "get_attr" for one in own):
        return None
    if any(uses[id(_attribute(module, one))] > 1 for one in own):
        return None
    values = _value(module, weight)
    zero = torch.zeros(len(values), dtype=values.dtype)
    return _Layer(node, values, zero if bias is None else _value(module, bias))


def _replace(module: GraphModule, node: Node, layer: _Layer, number: int) -> None:
    """Give a layer's node new weights, and let it stand for another node as well."""
    old = _attribute(module, layer.node.args[1])
    made = []
    for kind, value in (("weight", layer.weight), ("bias", layer.bias)):
        name = _free_name(module, f"folded_{number}_{kind}")
        module.register_parameter(name, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
        with module.graph.inserting_before(layer.node):
            made.append(module.graph.get_attr(name))
    layer.node.args = (layer.node.args[0], *made, *layer.node.args[3:])
    before: Any = node.args[0]
    node.replace_all_uses_with(before)
    module.graph.erase_node(node)


def _free_name(module: GraphModule, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


def _clean(module: GraphModule) -> None:
    """Remove weights that nothing reads any more."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    kept = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in kept:
            owner, _, own = name.rpartition(".")
            delattr(module.get_submodule(owner), own)
    module.recompile()


def _uses(module: GraphModule) -> Counter[int]:
    """How many nodes read each tensor of a program, by its id: tied weights have several names."""
    counted: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            counted[id(_attribute(module, node))] += len(node.users)
    return counted


def _attribute(module: GraphModule, node: Any) -> Any:
    return attrgetter(node.target)(module)


def _value(module: GraphModule, node: Any) -> Tensor:
    """In float64 and on the CPU: not every accelerator has it."""
    return _attribute(module, node).detach().cpu().double()
