"""What a model needs, before it is compiled: memory, time, and what fits."""
