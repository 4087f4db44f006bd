"""The native engine: integer programs as fused steps of C++, compiled on first use; see :mod:`.model`."""
