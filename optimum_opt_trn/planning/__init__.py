"""Planning before compiling: how much memory a model needs, how fast it can be, and what fits."""
