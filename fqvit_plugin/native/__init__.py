"""The native engine: integer programs as fused steps of C++, compiled on first use."""

from .model import NativeModel, Timing

__all__ = ['NativeModel', 'Timing']
