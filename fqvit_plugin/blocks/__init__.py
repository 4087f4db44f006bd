"""Quantized twins of transformer blocks, every tensor's quantizer named by its role."""
