"""The nonlinearities that may lie between a layer and the cut point it lands on, under both their names."""

ATEN = (
    *("relu", "leaky_relu", "_prelu_kernel", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus"),
    *("hardtanh", "hardswish", "hardsigmoid", "tanh", "sigmoid", "native_layer_norm", "_fused_rms_norm"),
)
"""As torch dispatches them. Their versions in place have a `_` behind."""

AUTOGRAD = frozenset(name.title().replace("_", "") for name in ATEN)
"""As autograd names the nodes they make, less `Backward0`: _prelu_kernel -> PreluKernel."""

DISPATCHED = frozenset(f"aten::{name}{in_place}" for name in ATEN for in_place in ("", "_"))
"""As a dispatch mode sees them, the versions in place as well."""
