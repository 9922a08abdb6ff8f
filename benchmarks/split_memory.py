#!/usr/bin/env python
"""Measures what splitting and loading a large OPT takes: anonymous memory at its peak, and time beside that of `cp`.

    python benchmarks/split_memory.py --directory /tmp          # shapes of OPT-2.7B, float32; 27 GB of disk
    python benchmarks/split_memory.py --layers 4 --hidden_size 512 --dtype f16  # a quick try

The checkpoint is made of random numbers, layer by layer, in one form after the other: sharded safetensors, one
safetensors file, one pytorch_model.bin. Each is split by `save_pretrained_split` in a process of its own, with
`cp --reflink=never` and `sync` of the same files before and after it, and by
`OPTForCausalLM.from_pretrained(low_cpu_mem_usage=True).save_pretrained`, unless --ours. Then the split checkpoint is
loaded at tensor-parallel degrees 1, 2 and 4. With --adapter, each is also split with an adapter.

Memory is RssAnon of /proc/PID/status, read every few milliseconds from outside: what a process has that is no file's,
so that the kernel cannot drop it. It includes the interpreter and the libraries, a few hundred megabytes, which the
first line says; the seconds do not include loading them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


SPLIT = """
import sys, time
from optimum_opt_trn import save_pretrained_split
source, output, amp, *adapter = sys.argv[1:]
start = time.perf_counter()
save_pretrained_split(source, output, amp=amp, adapter=adapter)
print(time.perf_counter() - start)
"""
TRANSFORMERS = """
import sys, time, torch, transformers
source, output, amp = sys.argv[1:]
dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[amp]
start = time.perf_counter()
model = transformers.OPTForCausalLM.from_pretrained(source, dtype=dtype, low_cpu_mem_usage=True)
model.save_pretrained(output)
print(time.perf_counter() - start)
"""
LOAD = """
import sys, time
from optimum_opt_trn import NeuronOPTForCausalLM
start = time.perf_counter()
model = NeuronOPTForCausalLM.from_pretrained(sys.argv[1], eager=True)
print(time.perf_counter() - start)
"""
# The packages import what they need when it is first asked for: torch and transformers are loaded here, as by SPLIT.
NOTHING = "from optimum_opt_trn import save_pretrained_split; print(0.0)"


def measured(code: str, *arguments: object) -> tuple[float, float]:
    """Runs a program; the seconds that it prints, and the most anonymous memory that it had, in bytes."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        peak = 0
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                peak = max(peak, int(fields["RssAnon"].split()[0]) * 1024)
            except (OSError, KeyError):  # it has just ended
                pass
            time.sleep(0.005)
        output, errors = child.stdout.read(), child.stderr.read()
    if child.returncode:
        sys.exit(f"failed: {errors}")
    return float(output.split()[-1]), peak


def copied(files: list[Path], directory: Path) -> float:
    """Seconds that `cp --reflink=never` and `sync` take for these files."""
    target = directory / "copy"
    target.mkdir()
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *files, target], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def tensors(config, dtype, only: int | None = None) -> Iterator[tuple[str, object]]:
    """Names and random values of a layer (-1: what is no layer's), or of all."""
    import torch

    from optimum_opt_trn.checkpoint.layout import checkpoint_files

    generator = torch.Generator().manual_seed(0)
    for index, specs in enumerate(checkpoint_files(config, "f32").values(), -1):
        if only in (None, index):
            for name, spec in specs.items():
                yield name, torch.empty(spec.shape).normal_(0, 0.02, generator=generator).to(dtype)


def write_sharded(config, dtype, directory: Path, per_shard: int = 8) -> None:
    from safetensors.torch import save_file

    weight_map = {}
    held: dict = {}
    number = 0

    def flush() -> None:
        nonlocal number
        file = f"model-{number:05d}.safetensors"
        save_file(held, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        held.clear()
        number += 1

    for layer in range(-1, config.num_hidden_layers):
        held.update(tensors(config, dtype, layer))
        if layer == -1 or layer % per_shard == per_shard - 1 or layer == config.num_hidden_layers - 1:
            flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_single(config, dtype, directory: Path) -> None:
    import torch

    from optimum_opt_trn.checkpoint.layout import TensorSpec, checkpoint_files
    from optimum_opt_trn.checkpoint.stream import write_tensors
    from optimum_opt_trn.dtypes import normalize_dtype

    # All tensors in one dtype, in the order that the writer wants them.
    amp = normalize_dtype(dtype)
    specs = {n: TensorSpec(s.shape, amp) for f in checkpoint_files(config, amp).values() for n, s in f.items()}
    torch.manual_seed(0)
    write_tensors(
        directory / "model.safetensors",
        specs,
        lambda name: iter([torch.empty(specs[name].shape).normal_(0, 0.02).to(dtype)]),
        lambda _: None,
    )


def write_bin(config, dtype, directory: Path) -> None:
    """In a process of its own, since torch.save wants all tensors at once: they are a map of the file beside."""
    code = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""
    write_single(config, dtype, directory)
    single = directory / "model.safetensors"
    subprocess.run([sys.executable, "-c", code, single, directory / "pytorch_model.bin"], check=True)
    single.unlink()


def write_adapter(config, rank: int, directory: Path) -> None:
    """A LoRA adapter of all matrices of the layers, in float32 as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    from optimum_opt_trn.checkpoint.layout import layer_prefix, layer_specs

    directory.mkdir()
    tensors = {}
    for index in range(config.num_hidden_layers):
        for name, spec in layer_specs(config, "f32").items():
            if len(spec.shape) == 2:
                module = f"base_model.model.{layer_prefix(index)}{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(rank, spec.shape[1])
                tensors[f"{module}.lora_B.weight"] = torch.randn(spec.shape[0], rank) * 1e-3
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (directory / "adapter_config.json").write_text(json.dumps(settings))


FORMS = {"sharded safetensors": write_sharded, "one safetensors": write_single, "one .bin": write_bin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=2560)
    parser.add_argument("--vocab_size", type=int, default=50272)
    parser.add_argument("--dtype", default="f32", choices=["f16", "bf16", "f32"], help="of the source")
    parser.add_argument("--amp", default="f16", choices=["f16", "bf16", "f32"], help="of the split checkpoint")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--repeat", type=int, default=2, help="splits of each form, between copies")
    parser.add_argument("--adapter", type=int, metavar="RANK", help="also split with a LoRA adapter of all matrices")
    parser.add_argument("--ours", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()

    import torch
    from transformers import OPTConfig

    from optimum_opt_trn import OPTNeuronConfig
    from optimum_opt_trn.checkpoint.layout import checkpoint_files
    from optimum_opt_trn.dtypes import to_torch
    from optimum_opt_trn.export import export_opt

    dtype = to_torch(arguments.dtype)
    config = OPTConfig(
        vocab_size=arguments.vocab_size, hidden_size=arguments.hidden_size, word_embed_proj_dim=arguments.hidden_size,
        ffn_dim=4 * arguments.hidden_size, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64, max_position_embeddings=2048, dtype=dtype,
    )  # fmt: skip
    # As the source has it, where layernorms and positions are in its dtype, too.
    largest = max(
        sum(torch.Size(spec.shape).numel() for spec in specs.values()) * dtype.itemsize
        for specs in checkpoint_files(config, arguments.dtype).values()
    )
    bound = largest + 400e6
    files = checkpoint_files(config, arguments.amp)
    written = sum(spec.bytes for specs in files.values() for spec in specs.values())
    base = measured(NOTHING)[1]
    print(
        f"{arguments.layers} layers of width {arguments.hidden_size}, {arguments.dtype} to {arguments.amp}, "
        f"{torch.get_num_threads()} threads; the split checkpoint has {len(files)} files, "
        f"{written / 1e9:.2f} GB. Largest file at the source's dtype: {largest / 1e6:.0f} MB, so the bound is "
        f"{bound / 1e6:.0f} MB. Interpreter and libraries alone: {base / 1e6:.0f} MB.\n",
        flush=True,
    )
    print("| source | by | peak RssAnon, MB | s | source GB/s | of cp + sync, GB/s |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="split-memory-", dir=arguments.directory) as made:
        root = Path(made)
        split = root / "split"
        variants: dict[str, list[Path]] = {"ours": []}
        if arguments.adapter:
            write_adapter(config, arguments.adapter, root / "adapter")
            variants[f"ours, merging rank {arguments.adapter}"] = [root / "adapter"]
        for form in arguments.forms:
            source = root / "source"
            source.mkdir()
            config.save_pretrained(source)
            FORMS[form](config, dtype, source)
            os.sync()
            files = [file for file in source.iterdir() if file.suffix != ".json"]
            size = sum(file.stat().st_size for file in files)
            if not arguments.ours:
                seconds, peak = measured(TRANSFORMERS, source, root / "theirs", arguments.amp)
                shutil.rmtree(root / "theirs")
                print(f"| {form} | transformers | {peak / 1e6:.0f} | {seconds:.1f} | {size / seconds / 1e9:.2f} | |")
            for variant in [*variants] * arguments.repeat:
                before = copied(files, root)
                shutil.rmtree(split, ignore_errors=True)
                os.sync()
                seconds, peak = measured(SPLIT, source, split, arguments.amp, *variants[variant])
                after = copied(files, root)
                cp = size / ((before + after) / 2) / 1e9
                speed = size / seconds / 1e9
                print(
                    f"| {form} | {variant} | {peak / 1e6:.0f} | {seconds:.1f} | {speed:.2f} | "
                    f"{speed / cp:.0%} of {cp:.2f} ({size / before / 1e9:.2f}, {size / after / 1e9:.2f}) |",
                    flush=True,
                )
            shutil.rmtree(source)
        print("\n| load | peak RssAnon, MB | s |\n|---|---|---|")
        for degree in (1, 2, 4):
            neuron_config = OPTNeuronConfig(sequence_length=256, tp_degree=degree, amp=arguments.amp)
            export = export_opt(split, root / "export", neuron_config, eager=True)
            seconds, peak = measured(LOAD, export)
            print(f"| tp {degree} | {peak / 1e6:.0f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
