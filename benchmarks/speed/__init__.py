"""The parts of `benchmarks/decode_cpu.py`."""
