#!/usr/bin/env python
"""Measures products of 16-bit weights with any number of rows: the CPU target's kernels and torch's.

    python benchmarks/linear_cpu.py                              # shapes of OPT-1.3B, 1 to 512 rows
    python benchmarks/linear_cpu.py --rows 32 48 64 --dtype bf16

There is a table for each instruction set that the package was built for and this processor has. `by output` is the
layout of the checkpoint. `by unit` is the transposed layout, in which decoding reads fc2. `90 % zero` has this share
of zeros among its inputs, whose weights are counted although they are not read. Torch multiplies in float32 with
weights that were converted before, which takes twice the memory, and in the weights' own dtype. All take turns, on
weights of at least 200 MB, so that they come from memory; medians. GFLOP/s count two operations for each weight and
row, GB/s the bytes of the 16-bit weights. The kernels' constants were chosen by this.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic, variants


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each way, in turns after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 48, 64, 128, 512])
    parser.add_argument("--shape", type=int, nargs=2, default=[8192, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--dtype", choices=DTYPES, default="f16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    n, k = arguments.shape
    count = -(-200_000_000 // (2 * n * k))
    weights = [torch.randn(n, k).to(DTYPES[arguments.dtype]) for _ in range(count)]
    by_unit = [weight.T.contiguous().T for weight in weights]
    converted = [weight.float() for weight in weights]
    print(f"{count} x ({n}, {k}) {arguments.dtype}, {torch.get_num_threads()} threads; GFLOP/s, (GB/s)")
    for variant in variants():
        arithmetic = KernelArithmetic(variant=variant)
        print(f"{variant}:")
        for rows in arguments.rows:
            x = torch.randn(rows, k)
            sparse, rounded = x * (torch.rand(rows, k) > 0.9), x.to(DTYPES[arguments.dtype])

            def kernel(x: torch.Tensor, weights: list[torch.Tensor], arithmetic=arithmetic) -> Callable[[], object]:
                return lambda: [arithmetic.linear_sum([x], [weight]) for weight in weights]

            ways: dict[str, Callable[[], object]] = {
                "by output": kernel(x, weights),
                "by unit": kernel(x, by_unit),
                "90 % zero": kernel(sparse, by_unit),
                "torch f32": lambda x=x: [linear(x, weight) for weight in converted],
                f"torch {arguments.dtype}": lambda x=rounded: [linear(x, weight) for weight in weights],
            }
            with torch.inference_mode():
                taken = seconds(ways, arguments.rounds)
            gigabytes = 2 * n * k * count / 1e9
            cells = (
                f"{name} {gigabytes * rows / spent:5.0f} ({gigabytes / spent:5.1f})" for name, spent in taken.items()
            )
            print(f"{rows:4d} rows: ", "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
