#!/usr/bin/env python
"""Shows where the time of a decoding step goes on the CPU target.

    python benchmarks/profile_step.py opt-1.3b-export                    # an export, as from_pretrained loads it
    python benchmarks/profile_step.py opt-1.3b-export --context 1536

Steps are timed as they are, then run again, each kernel called from Python and with a clock around it. The share of
each kind of work is printed: matrix products with the layernorms before them, attention, finding the best tokens, and
the rest (embedding, Python between calls). `generate()` around the steps is not included: benchmarks/decode_cpu.py
times it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.generation.inputs import pack
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic


# The calls of the kernels that a step consists of.
PARTS = {
    "linears": "matrix products",
    "linear_sum": "matrix products",
    "attend": "attention",
    "best": "token sampling",
}


def shares(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Of each part, its share of the time that `steps` steps take while the clock is read around calls; sums to 1."""
    seconds = dict.fromkeys(PARTS.values(), 0.0)

    def timed(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            start = time.perf_counter()
            result = method(*arguments, **options)
            seconds[PARTS[name]] += time.perf_counter() - start
            return result

        return call

    with ExitStack() as patches:
        for name in PARTS:
            method = timed(name, getattr(KernelArithmetic, name))
            patches.enter_context(patch.object(KernelArithmetic, name, method))
        start = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - start
    seconds["everything else"] = total - sum(seconds.values())
    return {part: spent / total for part, spent in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="directory of an export for cpu")
    parser.add_argument("--context", type=int, default=64, help="positions that are filled (default: 64)")
    parser.add_argument("--steps", type=int, default=20, help="steps to run (default: 20)")
    arguments = parser.parse_args()
    model = NeuronOPTForCausalLM.from_pretrained(arguments.export)
    rows, longest = model.neuron_config.batch_size, model.neuron_config.sequence_length
    if not 0 <= arguments.context < longest:
        parser.error(f"--context {arguments.context} is not below the export's {longest} positions.")
    ids, mask = torch.full((rows, 1), 5), torch.ones(rows, 1, dtype=torch.bool)
    filled, sampling = torch.full((rows,), arguments.context), SamplingInputs.greedy(rows)

    def step() -> object:
        return model.runtime.step(pack(ids, mask, list(range(rows)), filled, 1, sampling))

    times = []
    for _ in range(3 + arguments.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[3:]) * 1e3
    print(f"{median:.2f} ms a step (median of {arguments.steps}), {rows} rows, {torch.get_num_threads()} threads")
    model.runtime.captured = None
    for part, share in shares(step, arguments.steps).items():
        print(f"{part:>16} {share:6.1%}")


if __name__ == "__main__":
    main()
