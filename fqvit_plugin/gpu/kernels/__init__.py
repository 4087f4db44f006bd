"""The kernels, in Triton's language: a subset of Python that is compiled, so that annotations mean something else."""
