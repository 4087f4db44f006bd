"""Exported execution: an integer program as an ONNX file that proves itself before it is written."""

from .convert import FORMS, OnnxReport, to_onnx
from .targets import TARGETS

__all__ = ['FORMS', 'TARGETS', 'OnnxReport', 'to_onnx']
