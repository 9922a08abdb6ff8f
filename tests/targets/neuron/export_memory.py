"""Peak resident memory of an export for Neuron in the simulator: OPT-1.3B's shapes, and an almost empty model.

To be run by hand, in the environment of check_with_nxdsim.py, on Linux:

    python tests/targets/neuron/export_memory.py --nxdsim DIR --nxd DIR

Each row is a process of its own. The checkpoint's files are sparse: they have the right size, and no content. Exit
status: 1 if a peak is more than 1.3 times one rank's weights and caches above that of the almost empty model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


LENGTH, TP, LIMIT, GiB = 2048, 2, 1.3, 2**30
BUCKETS = {1: (LENGTH,), 3: (LENGTH // 4, LENGTH // 2, LENGTH)}
CASE = "EXPORT_MEMORY_CASE"


def resident(field: str) -> float:
    """GiB of this process: VmRSS, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def measure(layers: int, buckets: int) -> dict:
    """One export: its sizes and peaks in GiB; `layers` 0 is the almost empty model."""
    import check_with_nxdsim  # noqa: F401  makes the simulator importable and completes it
    from transformers import OPTConfig

    from optimum_opt_trn import OPTNeuronConfig
    from optimum_opt_trn.checkpoint.layout import CHECKPOINT_DIR, INDEX_NAME, checkpoint_files
    from optimum_opt_trn.checkpoint.stream import _header
    from optimum_opt_trn.hardware import INSTANCES
    from optimum_opt_trn.planning.memory import plan_memory
    from optimum_opt_trn.planning.setup import Setup
    from optimum_opt_trn.targets.neuron import NeuronTarget

    width, heads, words = (2048, 32, 50272) if layers else (64, 4, 200)
    config = OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_attention_heads=heads, vocab_size=words,
        num_hidden_layers=layers or 1, max_position_embeddings=LENGTH,
    )  # fmt: skip
    options = {"sequence_length": LENGTH, "prompt_buckets": BUCKETS[buckets], "cache_buckets": BUCKETS[buckets]}
    neuron_config = OPTNeuronConfig(batch_size=1, tp_degree=TP, amp="f16", instance_type="trn1", **options)
    plan = plan_memory(config, Setup.of(neuron_config), INSTANCES["trn1.2xlarge"])
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / CHECKPOINT_DIR
        checkpoint.mkdir()
        (checkpoint / INDEX_NAME).write_text("{}")
        for name, specs in checkpoint_files(config, "f16").items():
            header = _header(specs)
            (checkpoint / name).write_bytes(header)
            os.truncate(checkpoint / name, len(header) + sum(spec.bytes for spec in specs.values()))
        before, start = resident("VmRSS"), time.monotonic()
        NeuronTarget().compile(config, neuron_config, Path(directory), eager=False)
    on_core = (sum(plan.weights.values()) + plan.cache) / GiB
    return {"on_core": on_core, "before": before, "peak": resident("VmHWM"), "seconds": time.monotonic() - start}


def main() -> int:
    if CASE in os.environ:
        print(json.dumps(measure(*json.loads(os.environ[CASE]))))
        return 0
    print("| layers | graphs | weights and caches, GiB | before | peak | times, above the empty model | seconds |")
    print("|---|---|---|---|---|---|---|")
    failed, empty = False, 0.0
    for layers in (0, 24):
        for buckets in BUCKETS:
            environment = {**os.environ, CASE: json.dumps([layers, buckets])}
            ran = subprocess.run([sys.executable, *sys.argv], env=environment, stdout=subprocess.PIPE, text=True)
            if ran.returncode or not ran.stdout.splitlines()[-1].startswith("{"):
                print(ran.stdout)
                return ran.returncode
            found = json.loads(ran.stdout.splitlines()[-1])
            empty = empty if layers else max(empty, found["peak"])
            times = (found["peak"] - empty) / found["on_core"]
            failed |= bool(layers) and times > LIMIT
            figures = (found["on_core"], found["before"], found["peak"])
            shown = " | ".join(f"{figure:.2f}" for figure in figures)
            above = f"{times:.2f}" if layers else ""
            print(f"| {layers or 1} | {2 * buckets + 1} | {shown} | {above} | {found['seconds']:.0f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
