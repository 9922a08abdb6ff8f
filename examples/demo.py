#!/usr/bin/env python
"""Step 3 of 3: export an OPT, unless it is exported already, and let it write.

    python examples/demo.py examples/models/opt-austen          # the small model that comes with this repository
    python examples/demo.py opt-13b-split --tensor_parallel_size 2 --output opt-13b-export
    python examples/demo.py opt-13b-export --prompt "The capital of France is" --greedy
    python examples/demo.py MODEL --prompt "First of all" --prompt "In the end"      # a batch of two

MODEL is a checkpoint, split or not (a directory or a hub id), or an export. A checkpoint is exported first: the
weights are split and the kernels compiled, for the batch size, length and dtype that the options say. --output keeps
the export for the next time. One prompt is printed as it is written, several when they are done.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any


PROMPT = "It was a fine morning, and"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="facebook/opt-13b", help="checkpoint, hub id or export (default: %(default)s)")
    add("--prompt", action="append", help=f"text to go on from; may be given several times (default: {PROMPT!r})")
    add("--max_new_tokens", type=int, default=100, help="tokens to write (default: %(default)s)")
    choice = parser.add_argument_group("how tokens are chosen")
    choice.add_argument("--greedy", action="store_true", help="always the most likely one; no sampling")
    choice.add_argument("--temperature", type=float, default=0.8, help="(default: %(default)s)")
    choice.add_argument("--top_k", type=int, default=50, help="(default: %(default)s)")
    choice.add_argument("--top_p", type=float, default=0.95, help="(default: %(default)s)")
    choice.add_argument("--seed", type=int, default=0, help="the same seed writes the same (default: %(default)s)")
    export = parser.add_argument_group("how a checkpoint is exported (an export has this decided)")
    export.add_argument("--output", type=Path, help="directory that keeps the export")
    export.add_argument("--batch_size", type=int, help="rows at a time (default: the number of prompts)")
    export.add_argument("--sequence_length", type=int, help="tokens a row, prompt included (default: the model's)")
    export.add_argument("--tensor_parallel_size", type=int, help="ranks to split the weights over (default: 1)")
    export.add_argument("--auto_cast_type", choices=["fp16", "bf16", "fp32"], help="dtype (default: fp16)")
    parser.add_argument("--eager", action="store_true", help="do not compile: ready at once, slower per token")
    return parser.parse_args()


def load(arguments: argparse.Namespace, rows: int) -> Any:
    """The model, exported on the way if it is not an export."""
    from optimum_opt_trn import NeuronOPTForCausalLM

    if arguments.output and arguments.output.exists():
        raise ValueError(f"{arguments.output} exists: run `demo.py {arguments.output}`, or choose another --output.")
    options = {
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.sequence_length,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "amp": arguments.auto_cast_type,
    }
    if not (Path(arguments.model) / "neuron_config.json").is_file():
        options["batch_size"] = arguments.batch_size or rows
        if not arguments.eager:
            print(f"Exporting {arguments.model}.", flush=True)
    given = {name: value for name, value in options.items() if value is not None}
    model = NeuronOPTForCausalLM.from_pretrained(arguments.model, eager=arguments.eager, **given)
    if arguments.output:
        model.save_pretrained(arguments.output)
    return model


def write(model: Any, tokenizer: Any, prompts: list[str], arguments: argparse.Namespace) -> None:
    """Generates, prints the texts and how long it took."""
    from transformers import TextStreamer, set_seed

    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": not arguments.greedy}
    if not arguments.greedy:
        options.update(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    if len(prompts) == 1:
        options["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
    set_seed(arguments.seed)
    print("-" * 80)
    start = time.perf_counter()
    output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    seconds = time.perf_counter() - start
    if len(prompts) > 1:
        print("\n\n".join(tokenizer.batch_decode(output, skip_special_tokens=True)))
    print("-" * 80)
    # A row that ended early is filled with pad tokens, which nobody wrote.
    tokens = int((output[:, inputs["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
    config = model.neuron_config
    print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s in a batch of {len(prompts)}, ", end=""
    )
    print(f"the prompt's time included (target {config.target}, {config.amp}, tp {config.tp_degree})")


def main() -> int:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")  # libraries' remarks to developers
    # Slow imports wait until here, so that --help answers at once.
    from transformers import AutoTokenizer

    start = time.perf_counter()
    try:
        prompts = arguments.prompt or [PROMPT]
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
        model = load(arguments, len(prompts))
        kept = f", and kept in {arguments.output}" if arguments.output else ""
        print(f"{arguments.model} is ready after {time.perf_counter() - start:.1f} s{kept}")
        write(model, tokenizer, prompts, arguments)
    except (OSError, ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
