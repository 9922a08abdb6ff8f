"""`generate()` and `forward()`: what transformers needs around a loop of steps."""
