"""Exported execution: an integer program as an ONNX file that proves itself before it is written."""

from .convert import OnnxReport, to_onnx

__all__ = ['OnnxReport', 'to_onnx']
