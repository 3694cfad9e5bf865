"""Models taken out of a study: programs, ONNX, weights, each checked against the model on validation."""

from spansearch.export.formats import FORMATS, Exported, export, require

__all__ = ["FORMATS", "Exported", "export", "require"]
