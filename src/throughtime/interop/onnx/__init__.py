"""ONNX: layers and models written as files that any runtime reads, and the recurrent nodes of such files as layers."""

from throughtime.interop.onnx.exporting import export

__all__ = ["export"]
