"""Where a quantized model loses: the effect of every tensor alone, and of everything but it, on the outputs."""
