"""The integer execution of a quantized model: integer dtypes from the quantized image to the logits' codes."""
