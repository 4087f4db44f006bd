"""What quantization did to the numbers: measured per tensor and end to end, for the terminal, a page and plots."""
