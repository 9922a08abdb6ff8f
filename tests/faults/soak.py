"""Calls a small model many times with random options: memory, threads and handles stay, results repeat.

PYTHONPATH=tests/support python tests/faults/soak.py --calls 20000 --seed 1

Writes docs/reliability.md if all of it holds, and ends with status 1 if not.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from report import where, write_section
from small_models import tiny_opt
from transformers import set_seed

from optimum_opt_trn import NeuronOPTForCausalLM


# Resident memory after the warm-up may grow by so much.
GROWTH = 0.02


@dataclass(frozen=True)
class Result:
    """What a soak saw.

    Args:
        calls, refused: how many calls there were, and how many of them were refused by an error.
        repeated, different: how many of the first calls were made again at the end, and how many gave other results.
        memory: resident bytes after the warm-up and at the end.
        peak: the most resident bytes after any call since the warm-up.
        threads, handles: how many there were after the warm-up and at the end.
    """

    calls: int
    refused: int
    repeated: int
    different: int
    memory: tuple[int, int]
    peak: int
    threads: tuple[int, int]
    handles: tuple[int, int]

    def problems(self) -> list[str]:
        before, after = self.memory
        found = [f"{self.different} calls gave other results at the end"] * bool(self.different)
        if after > before * (1 + GROWTH):
            found.append(f"resident memory grew from {before} to {after} bytes")
        for name in ("threads", "handles"):
            first, last = getattr(self, name)
            if last > first:
                found.append(f"{last - first} {name} were left")
        return found


def draw(random: Random) -> dict[str, object]:
    """Options of one call."""
    rows = random.randint(1, 4)
    length = random.randint(1, 24)
    options: dict[str, object] = {
        "input_ids": torch.tensor([[random.randrange(4, 128) for _ in range(length)] for _ in range(rows)]),
        "max_new_tokens": random.randint(1, 8),
        "pad_token_id": 1,
    }
    if random.random() < 0.5 and length > 1:
        mask = torch.ones(rows, length, dtype=torch.int64)
        for row in mask:
            row[: random.randrange(length)] = 0
        options["attention_mask"] = mask
    kind = random.choice(["greedy", "sample", "sample", "beams", "lookup", "forward", "wrong"])
    if kind == "sample":
        options |= {"do_sample": True, "temperature": random.uniform(0.3, 2), "top_k": random.choice([0, 1, 5, 50])}
        options |= {"top_p": random.uniform(0.3, 1)} if random.random() < 0.5 else {}
    elif kind == "beams":
        options |= {"num_beams": random.randint(2, 3), "do_sample": random.random() < 0.3}
    elif kind == "lookup":
        options["prompt_lookup_num_tokens"] = random.randint(1, 4)
    elif kind == "forward":
        options["forward"] = True
    elif kind == "wrong":
        options |= random.choice(
            [{"max_new_tokens": 10**6}, {"temprature": 1.0}, {"input_ids": torch.tensor([[999]])}]
        )
    more = {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 1,
        "bad_words_ids": [[7]],
        "suppress_tokens": [9, 10],
        "output_scores": True,
        "return_dict_in_generate": True,
        "eos_token_id": random.randrange(4, 128),
        "num_return_sequences": 1,
        "use_cache": True,
    }
    for name, value in more.items():
        if random.random() < 0.15:
            options[name] = value
    return options


def call(model: NeuronOPTForCausalLM, seed: int) -> tuple[str, bool]:
    """The call of a seed: a hash of all that it returned, and whether it was refused."""
    options = draw(Random(seed))
    set_seed(seed)
    digest = hashlib.sha256()
    try:
        if options.pop("forward", False):
            inputs = {name: options[name] for name in ("input_ids", "attention_mask") if name in options}
            returned: object = model(**inputs).logits
        else:
            returned = model.generate(**options)
    except (ValueError, TypeError, NotImplementedError) as error:
        return str(error), True
    tensors = [returned] if isinstance(returned, torch.Tensor) else [returned["sequences"], *(returned.scores or ())]
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest(), False


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(directory: Path, calls: int, seed: int) -> Result:
    """Makes `calls` calls, the first twentieth of them once more at the end; a tenth is the warm-up."""
    tiny_opt().save_pretrained(directory / "source")
    model = NeuronOPTForCausalLM.from_pretrained(directory / "source", batch_size=4, sequence_length=64)
    first, warm_up = [], calls // 10
    refused = peak = 0
    memory = threads = handles = 0
    for number in range(calls):
        result, was_refused = call(model, seed * 1_000_000 + number)
        refused += was_refused
        if number < calls // 20:
            first.append(result)
        if number == warm_up:
            memory, threads, handles = resident(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        elif number > warm_up and number % 500 == 0:
            peak = max(peak, resident())
            print(f"{number} calls, {resident() / 1e6:.1f} MB", flush=True)
    different = sum(call(model, seed * 1_000_000 + number)[0] != result for number, result in enumerate(first))
    end = resident(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    return Result(
        calls,
        refused,
        len(first),
        different,
        (memory, end[0]),
        max(peak, end[0]),
        (threads, end[1]),
        (handles, end[2]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        result = soak(Path(directory), arguments.calls, arguments.seed)
    if problems := result.problems():
        print(*problems, sep="\n", file=sys.stderr)
        raise SystemExit(1)
    before, after = (size / 1e6 for size in result.memory)
    rows = {
        "calls, of which refused by an error": f"{result.calls:,}, {result.refused:,}",
        "first calls made again at the end; other results": f"{result.repeated:,}; {result.different}",
        "resident memory after the warm-up, at the end, at most": f"{before:.1f}, {after:.1f}, "
        f"{result.peak / 1e6:.1f} MB ({100 * (after / before - 1):+.1f} % at the end)",
        "threads after the warm-up, at the end": f"{result.threads[0]}, {result.threads[1]}",
        "open files after the warm-up, at the end": f"{result.handles[0]}, {result.handles[1]}",
    }
    minutes = (time.monotonic() - started) / 60
    lines = [f"{where()}; seed {arguments.seed}, {minutes:.0f} minutes.", "", "| what | seen |", "|---|---|"]
    write_section("soak", "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]))


if __name__ == "__main__":
    main()
