#!/usr/bin/env python
"""Measures products of 16-bit and int8 weights with any number of rows: the CPU target's kernels and torch's.

    python benchmarks/linear_cpu.py                              # shapes of OPT-1.3B, 1 to 512 rows
    python benchmarks/linear_cpu.py --rows 32 48 64 --dtype bf16
    python benchmarks/linear_cpu.py --rows 1 2 --dtype int8 --megabytes 16   # from the cache: what arithmetic allows

Each number of rows has a line for each instruction set that the package was built for and this processor has, and
one for torch. `by output` is the layout of the checkpoint. `by unit` is the transposed layout, in which decoding
reads fc2. `90 % zero` has this share of zeros among its inputs, whose weights are counted although they are not read.
`screened` has biases with which 90 % of each row's results are 0 after a ReLU, as fc1's, and an int8 copy that tells
most of these; all weights are counted, and the copy is not. It is for few rows of 16-bit weights.
Torch multiplies in float32 with weights that were converted before, which takes twice the memory or more, and in
their own dtype unless that is int8. All take turns, on weights of at least 200 MB, so that they come from memory;
medians. GFLOP/s count two operations for each weight and row, GB/s the bytes of the weights as they are stored. The
kernels' constants were chosen by this.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from optimum_opt_trn.targets.cpu.int8_copy import Screen, int8_copy
from optimum_opt_trn.targets.cpu.kernels import MOST_SCREENED_ROWS, KernelArithmetic, variants


# What computes, and which product: a line and a cell.
Way = tuple[str, str]

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def seconds(ways: dict[Way, Callable[[], object]], rounds: int) -> dict[Way, float]:
    """The median time of each way, in turns after one to warm up."""
    times: dict[Way, list[float]] = {name: [] for name in ways}
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
    parser.add_argument("--megabytes", type=int, default=200, help="of weights, at least (default: 200)")
    parser.add_argument("--variants", nargs="+", choices=variants(), default=variants(), metavar="VARIANT",
                        help=f"of {', '.join(variants())} (default: all)")  # fmt: skip
    arguments = parser.parse_args()
    n, k = arguments.shape
    dtype = DTYPES[arguments.dtype]
    count = -(-arguments.megabytes * 1_000_000 // (dtype.itemsize * n * k))
    if dtype.is_floating_point:
        weights, scale = [torch.randn(n, k).to(dtype) for _ in range(count)], None
    else:
        weights = [torch.randint(-127, 128, (n, k), dtype=dtype) for _ in range(count)]
        scale = torch.rand(n, 1)
    screens = [Screen([int8_copy(weight)]) for weight in weights if dtype.is_floating_point]
    # A result without it has a standard deviation of sqrt(k); 10 % of normal numbers are above 1.28 of theirs.
    bias = torch.full((n,), -1.28 * k**0.5).to(dtype)
    by_unit = [weight.T.contiguous().T for weight in weights]
    converted = [weight.float() for weight in weights]
    print(f"{count} x ({n}, {k}) {arguments.dtype}, {torch.get_num_threads()} threads; GFLOP/s, (GB/s)")
    for rows in arguments.rows:
        x = torch.randn(rows, k)
        sparse, rounded = x * (torch.rand(rows, k) > 0.9), x.to(dtype)

        def kernel(variant: str, x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], object]:
            arithmetic = KernelArithmetic(variant=variant)
            return lambda: [arithmetic.linear_sum([x], [weight], scale=scale) for weight in weights]

        def screened(variant: str, x: torch.Tensor) -> Callable[[], object]:
            arithmetic = KernelArithmetic(variant=variant)
            both = list(zip(weights, screens, strict=True))
            return lambda: [arithmetic.screened(x, [weight], [bias], screen, None) for weight, screen in both]

        ways: dict[Way, Callable[[], object]] = {}
        for variant in arguments.variants:
            ways[variant, "by output"] = kernel(variant, x, weights)
            ways[variant, "by unit"] = kernel(variant, x, by_unit)
            ways[variant, "90 % zero"] = kernel(variant, sparse, by_unit)
            if screens and rows <= MOST_SCREENED_ROWS:
                ways[variant, "screened"] = screened(variant, x)
        ways["torch", "f32"] = lambda x=x: [linear(x, weight) for weight in converted]
        if dtype.is_floating_point:
            ways["torch", arguments.dtype] = lambda x=rounded: [linear(x, weight) for weight in weights]
        with torch.inference_mode():
            taken = seconds(ways, arguments.rounds)
        gigabytes = dtype.itemsize * n * k * count / 1e9
        for line in dict.fromkeys(line for line, _ in ways):
            cells = (
                f"{way} {2 * gigabytes / dtype.itemsize * rows / spent:5.0f} ({gigabytes / spent:5.1f})"
                for (name, way), spent in taken.items()
                if name == line
            )
            print(f"{rows:4d} rows, {line + ':':12}", "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
