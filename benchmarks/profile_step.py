#!/usr/bin/env python
"""Shows where the time of a decoding step goes on the CPU target.

    python benchmarks/profile_step.py opt-1.3b-export                    # an export, as from_pretrained loads it
    python benchmarks/profile_step.py opt-1.3b-export --context 1536

Steps are timed as they are, then run again under torch's profiler; of each kind of work the share of the profiled time
is printed: matrix products, attention, layernorms, and the rest (embedding, token sampling, Python between calls,
and what the profiler itself takes). `generate()` around the steps is not in it: benchmarks/decode_cpu.py times that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.generation.inputs import pack
from optimum_opt_trn.model.sampling import SamplingInputs


PARTS = {
    "optimum_opt_trn::linears": "matrix products",
    "optimum_opt_trn::linear_sum": "matrix products",
    "optimum_opt_trn::attend": "attention",
    "aten::layer_norm": "layernorms",
}


def shares(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Of each part, its share of the time that `steps` steps take under the profiler; their sum is 1."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - start
    seconds = dict.fromkeys(PARTS.values(), 0.0)
    for event in profiled.events():
        if event.name in PARTS:
            seconds[PARTS[event.name]] += event.cpu_time_total / 1e6
            around = event.cpu_parent
            if around is not None and around.name in PARTS:  # as layernorms in products
                seconds[PARTS[around.name]] -= event.cpu_time_total / 1e6
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
    for part, share in shares(step, arguments.steps).items():
        print(f"{part:>16} {share:6.1%}")


if __name__ == "__main__":
    main()
