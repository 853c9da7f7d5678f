"""ONNX: layers and models written as files that any runtime reads, and the recurrent nodes of such files as layers."""

from throughtime.interop.onnx.exporting import export
from throughtime.interop.onnx.loading import load

__all__ = ["export", "load"]
