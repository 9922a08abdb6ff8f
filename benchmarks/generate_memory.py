#!/usr/bin/env python
"""Measures the memory in which an OPT of a published shape is exported, loaded and generates.

    python benchmarks/generate_memory.py --shape 6.7b --weight_dtype int8 --directory /scratch   # 23 GB of disk
    python benchmarks/generate_memory.py --shape tiny                                            # to try it

The checkpoint has random weights in float16, written layer by layer. It is exported, and the export is loaded and
generates, each in a process of its own. Memory is that of /proc/PID/status, read every few milliseconds from outside:

- anonymous (RssAnon): what is no file's, which the kernel cannot drop;
- of files (RssFile): pages of mapped files, weights above all, which it can drop and read again;
- resident: the most that both were together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from speed.checkpoints import SHAPES, make_checkpoint


EXPORT = """
import sys, time
from optimum_opt_trn import NeuronOPTForCausalLM
source, directory, weight_dtype, batch_size, length = sys.argv[1:]
start = time.perf_counter()
neuron_config = NeuronOPTForCausalLM.get_neuron_config(
    source, batch_size=int(batch_size), sequence_length=int(length), weight_dtype=weight_dtype
)
NeuronOPTForCausalLM.export(source, neuron_config=neuron_config).save_pretrained(directory)
print(time.perf_counter() - start)
"""
GENERATE = """
import sys, time, torch
from optimum_opt_trn import NeuronOPTForCausalLM
directory, rows, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
start = time.perf_counter()
model = NeuronOPTForCausalLM.from_pretrained(directory)
ids = torch.arange(4, 4 + rows * prompt).reshape(rows, prompt)
made = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
assert made.shape == (rows, prompt + new)
print(time.perf_counter() - start)
"""
FIELDS = ("RssAnon", "RssFile", "RssShmem")


@dataclass
class Peaks:
    """In bytes, each at its own time."""

    anonymous: int = 0
    files: int = 0
    resident: int = 0


def watched(code: str, *arguments: object) -> tuple[float, Peaks]:
    """Runs a program; the seconds that it prints, and its peaks."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    peaks = Peaks()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            status = Path(f"/proc/{child.pid}/status")
            while child.poll() is None:
                try:
                    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                    anonymous, files, shared = (int(lines[name].split()[0]) * 1024 for name in FIELDS)
                except (OSError, KeyError):  # it has just ended
                    continue
                peaks.anonymous, peaks.files = max(peaks.anonymous, anonymous), max(peaks.files, files)
                peaks.resident = max(peaks.resident, anonymous + files + shared)
                time.sleep(0.01)
            output = child.stdout.read()
        if child.returncode:
            errors.seek(0)
            sys.exit(f"ended with {child.returncode}: {errors.read()[-2000:]}")
    return float(output.split()[-1]), peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="6.7b", choices=list(SHAPES), help="of the checkpoint that is made")
    parser.add_argument("--checkpoint", type=Path, help="one that is there, instead of random weights")
    parser.add_argument("--weight_dtype", default="int8", choices=["int8", "f16"], help="of the export")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each row's prompt (default: 64)")
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    given = parser.parse_args()
    print("| step | s | anonymous, GB | of files, GB | resident, GB |\n|---|---|---|---|---|")

    def row(step: str, seconds: float, peaks: Peaks) -> None:
        shown = " | ".join(f"{size / 1e9:.2f}" for size in (peaks.anonymous, peaks.files, peaks.resident))
        print(f"| {step} | {seconds:.0f} | {shown} |", flush=True)

    with tempfile.TemporaryDirectory(prefix="generate-memory-", dir=given.directory) as made:
        checkpoint = given.checkpoint or make_checkpoint(given.shape, Path(made, "checkpoint"))
        export = Path(made, "export")
        sizes = (given.batch_size, given.sequence_length)
        row("export", *watched(EXPORT, checkpoint.absolute(), export, given.weight_dtype, *sizes))
        arguments = (export, given.batch_size, given.prompt, given.new_tokens)
        row(f"load, generate {given.new_tokens} tokens", *watched(GENERATE, *arguments))


if __name__ == "__main__":
    main()
