#!/usr/bin/env python
"""Step 2 of 3: write the weights as a split checkpoint, one safetensors file for each layer.

    python examples/split.py                                    # ./opt-13b -> ./opt-13b-split, float16
    python examples/split.py opt-125m opt-125m-split --amp bf16
    python examples/split.py facebook/opt-125m                  # from the hub, in one go

Attention, MLP, embedding and head are cast to --amp; layernorms and position embeddings stay float32. One layer at a
time is in memory, so that a model larger than the memory can be split. The result is an ordinary checkpoint:
`OPTForCausalLM.from_pretrained` loads it, and `optimum-cli export neuron` takes it at any tensor-parallel degree.
Exporting a checkpoint that is not split splits it on the way; this step is for doing that once, for several exports.
Next: examples/demo.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", nargs="?", help="directory or hub id (default: opt-13b if it is there, else facebook/opt-13b)"
    )
    parser.add_argument("output", nargs="?", type=Path, help="where to write (default: the source's name and -split)")
    parser.add_argument(
        "--amp", default="f16", choices=["f16", "bf16", "f32"], help="dtype of the weights (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Slow imports wait until here, so that --help answers at once.
    from optimum_opt_trn import save_pretrained_split

    source = arguments.source or ("opt-13b" if Path("opt-13b").is_dir() else "facebook/opt-13b")
    output = arguments.output or Path(f"{Path(source).name}-split")
    try:
        save_pretrained_split(source, output, amp=arguments.amp)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    files = sorted(output.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{output}: {len(files)} files, {size / 1e9:.2f} GB, weights in {arguments.amp}.")
    print(f"Next: python examples/demo.py {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
