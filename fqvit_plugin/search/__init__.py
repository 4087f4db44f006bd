"""NNI: a search over recipes under a size budget, and FQ-ViT as one of NNI's quantizers."""
