"""A program as ONNX, by the exporter of PyTorch; what it computes is checked by onnxruntime."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from spansearch.errors import ExportError, pass_on_stop
from spansearch.export.agreement import said
from spansearch.export.calls import Call
from spansearch.export.program import quiet

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LOGGERS = ("torch.onnx", "onnxscript")
"""They tell of optional packages that are not there, and of what they tried in vain to make smaller."""
LARGEST = 2**31 - 1
"""Bytes that one ONNX file holds."""


def require_onnx() -> None:
    """Raise ExportError where a package of the extra is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f"ONNX files need the package {name}, which cannot be imported ({error}): PyTorch writes "
                "them with onnx and onnxscript, and onnxruntime checks them. Install the extra: pip install "
                "'spansearch[onnx]'."
            ) from error


def to_onnx(program: ExportedProgram) -> bytes:
    """The program as one ONNX file, weights included; inputs are named as the model's arguments are.

    Raises:
        ExportError: the exporter does not know an operator, or the file would hold more than 2 GiB.
    """
    require_onnx()
    if sum(value.numel() * value.element_size() for value in program.state_dict.values()) > LARGEST:
        raise ExportError(
            "The model's weights take more than 2 GiB, which one ONNX file cannot hold. Export a .pt2."
        )
    try:
        with quiet(), _silent(*LOGGERS):
            made = torch.onnx.export(
                program, (), dynamo=True, verbose=False, output_names=_output_names(program)
            )
    except Exception as error:  # it wraps whatever went wrong
        pass_on_stop(error)
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ExportError(
            f"PyTorch's ONNX exporter cannot write this model: {said(cause)} A .pt2 is made of the same "
            "program: try that."
        ) from error
    assert made is not None
    return bytes(made.model_proto.SerializeToString())


def runner(data: bytes, program: ExportedProgram, traced: Call) -> Callable[[Call], Any]:
    """Runs an ONNX file on the CPU, on calls like the one that the program was traced on."""
    import onnxruntime  # of the extra

    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:
        pass_on_stop(error)
        raise ExportError(
            f"onnxruntime cannot load what PyTorch wrote: {said(error)} A .pt2 is made of the same program: "
            "try that."
        ) from error
    names = _input_names(program)
    wanted = {one.name for one in session.get_inputs()}

    def run(call: Call) -> list[torch.Tensor]:
        leaves = pytree.tree_leaves((call.args, {name: call.kwargs[name] for name in traced.kwargs}))
        arrays = {
            name: leaf.detach().cpu().numpy()
            for name, leaf in zip(names, leaves, strict=True)
            if name in wanted
        }
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Without what loggers say below an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _input_names(program: ExportedProgram) -> list[str]:
    return [str(name) for name in program.graph_signature.user_inputs]


def _output_names(program: ExportedProgram) -> list[str]:
    """``logits`` of a dict's entry, ``output`` of a tensor alone, ``output.0`` of a tuple's item."""
    spec = program.call_spec.out_spec
    assert spec is not None
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    keys = [[str(getattr(key, "key", getattr(key, "idx", key))) for key in path] for path, _ in paths]
    names = [".".join(key if key and not key[0].isdigit() else ["output", *key]) for key in keys]
    taken = set(_input_names(program))
    return [f"{name}_out" if name in taken else name for name in names]
