"""The memory plan against what the CPU target holds: a table of predicted and measured bytes over a grid of shapes.

    python benchmarks/memory_cpu.py                         # the grid of docs/memory.md, some ten minutes
    python benchmarks/memory_cpu.py --hidden 512 --amp f16  # a part of it
    python benchmarks/memory_cpu.py --small                 # two shapes, which a test runs

For each shape a checkpoint is written and loaded with the compiled kernels, in a process of its own and on one thread,
and every weight and cache tensor is touched. Columns, in MB (10^6):

- predicted: weights and cache, by the plan;
- tensors: bytes of the tensors that the runtime holds;
- resident: pages of the mapped checkpoint that are resident, and the growth of anonymous memory (/proc/self/smaps,
  /proc/self/status);
- workspace: predicted, and the growth of the process's peak while it runs the longest prompt;
- peak: how far the plan's total is from resident and measured workspace together.

With --eager it runs without the kernels, which the workspace is not planned for. Exit status 1 if tensors or resident
bytes are more than 2 % from the prediction, and 64 KiB a layer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig

from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.checkpoint.formats import Piece
from optimum_opt_trn.checkpoint.layout import CHECKPOINT_DIR, checkpoint_files
from optimum_opt_trn.checkpoint.small_files import save_config
from optimum_opt_trn.checkpoint.source import WeightSource
from optimum_opt_trn.checkpoint.write import write_split
from optimum_opt_trn.generation.inputs import pack
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.planning.host import this_host
from optimum_opt_trn.planning.memory import plan_memory
from optimum_opt_trn.planning.setup import Setup
from optimum_opt_trn.targets import get_target
from optimum_opt_trn.targets.cpu.runtime import CPURuntime


TOLERANCE = 0.02
# Where a page of a file is read first, Linux maps those around it, 64 KiB together (mm/memory.c, fault_around_bytes):
# of each layer's copies also some of fc1's, which is not read here.
AROUND = 65536
# hidden -> (units of the MLP, layers), of such sizes that 2 % are more than Python's own objects take, some 1 to 3 MB.
# The last has the width of OPT-1.3B, and with it the workspace.
SHAPES = {256: (16384, 8), 512: (2048, 12), 768: (3072, 12), 1024: (4096, 8), 2048: (8192, 2)}
AMPS = ("f16", "bf16", "f32")


def shape(hidden: int) -> OPTConfig:
    ffn_dim, layers = SHAPES[hidden]
    return OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=ffn_dim,
        num_attention_heads=hidden // 64,
        num_hidden_layers=layers,
    )


def write_export(config: OPTConfig, amp: str, directory: Path, eager: bool) -> None:
    files = checkpoint_files(config, amp)
    specs = {name: spec for file in files.values() for name, spec in file.items()}
    readers = {name: (lambda spec=spec: torch.full(spec.shape, 0.01)) for name, spec in specs.items()}
    neuron_config = OPTNeuronConfig(amp=amp)
    source = WeightSource([Piece(lambda: readers, lambda names: "constant")], "constant weights", files)
    write_split(source, directory / CHECKPOINT_DIR, amp, partial(save_config, config, amp))
    get_target(neuron_config).compile(config, neuron_config, directory, eager)


def measure(config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> dict[str, int]:
    """Bytes that the loaded export in `directory` holds and needs."""
    # Freed blocks go back to the system, so that what is resident is what is in use: those of before, and each one of
    # 64 KiB or more at once (mallopt's M_MMAP_THRESHOLD is -3).
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 64 * 1024)
    _load(config, neuron_config, directory, eager)  # what a first time allocates for good is no part of it
    gc.collect()
    libc.malloc_trim(0)
    before = _status("RssAnon")
    runtime, tensors, caches = _load(config, neuron_config, directory, eager)
    # A tied head is the embedding; both parts list it.
    distinct = {(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in (*tensors, *caches)}
    anonymous = _status("RssAnon") - before  # read first: the text of smaps takes a MB or two itself
    resident = _resident_of(directory) + anonymous

    batch, length = neuron_config.batch_size, neuron_config.sequence_length
    sampling = SamplingInputs.greedy(batch)
    ids, mask = torch.ones(batch, length, dtype=torch.int32), torch.ones(batch, length, dtype=torch.bool)
    slots, filled = list(range(batch)), torch.zeros(batch, dtype=torch.int64)
    runtime.step(pack(ids[:, :2], mask[:, :2], slots, filled, 1, sampling))  # what a first run allocates for good
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (man 5 proc)
    runtime.step(pack(ids, mask, slots, filled, 1, sampling))
    return {"tensors": sum(distinct.values()), "resident": resident, "workspace": _status("VmHWM") - held}


def _load(
    config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool
) -> tuple[CPURuntime, list[torch.Tensor], list[torch.Tensor]]:
    """The loaded export, its weights and its caches, each of them touched."""
    runtime = get_target(neuron_config).load(config, neuron_config, directory, eager)
    parts = [runtime.weights.embed, runtime.weights.head, *runtime.weights.layers]
    tensors = [tensor for part in parts for shards in part.values() for tensor in shards]
    caches = [tensor for layer in runtime.cache for tensor in (*layer.keys, *layer.values)]
    for tensor in tensors:
        tensor.sum()
    for tensor in caches:
        tensor.zero_()
    return runtime, tensors, caches


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _resident_of(directory: Path) -> int:
    """Resident bytes of the files in `directory`; pages that are mapped twice count once (Pss)."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            ours = str(directory) in line
        elif first == "Pss:" and ours:
            total += int(line.split()[1]) * 1024
    return total


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a fork of this process, whose own memory it leaves as it is."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(write, "w") as out:
            json.dump(function(*arguments), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as result:
        text = result.read()
    os.waitpid(child, 0)
    return json.loads(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two shapes")
    parser.add_argument("--hidden", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--amp", nargs="+", choices=AMPS, default=AMPS)
    parser.add_argument("--tp", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 3))
    parser.add_argument("--length", type=int, default=512, help="of slots and prompts (default: 512)")
    parser.add_argument("--eager", action="store_true", help="without the kernels")
    options = parser.parse_args()
    eager: bool = options.eager
    torch.set_num_threads(1)
    if options.small:
        configs, amps, degrees, batches, length = [shape(512)], ("f16",), (1, 2), (3,), 256
    else:
        configs, amps, length = [shape(hidden) for hidden in options.hidden], options.amp, options.length
        degrees, batches = options.tp, options.batch
    host, failed = this_host(), 0
    print(
        "| width | layers | amp | tp | batch | predicted | tensors | resident | off by | workspace | measured | peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for config, amp in itertools.product(configs, amps):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            in_a_process(write_export, config, amp, directory, eager)
            for degree, batch in itertools.product(degrees, batches):
                neuron_config = OPTNeuronConfig(batch_size=batch, sequence_length=length, tp_degree=degree, amp=amp)
                plan = plan_memory(config, Setup.of(neuron_config), host)
                predicted = sum(plan.weights.values()) + plan.cache
                found = in_a_process(measure, config, neuron_config, directory, eager)
                off = max((found[key] / predicted - 1 for key in ("tensors", "resident")), key=abs)
                failed += abs(off) > TOLERANCE + config.num_hidden_layers * AROUND / predicted
                shown = " | ".join(f"{n / 1e6:.1f}" for n in (predicted, found["tensors"], found["resident"]))
                spent = " | ".join(f"{n / 1e6:.1f}" for n in (plan.workspace, found["workspace"]))
                peak = (found["resident"] + found["workspace"]) / plan.total - 1
                cells = (config.hidden_size, config.num_hidden_layers, amp, degree, batch, shown, f"{off:+.2%}", spent)
                print(f"| {' | '.join(map(str, cells))} | {peak:+.2%} |", flush=True)
    print(f"{failed} beyond {TOLERANCE:.0%}" if failed else f"all within {TOLERANCE:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
