#!/usr/bin/env python
"""Step 1 of 3: fetch an OPT checkpoint from the Hugging Face Hub, or check one that is on this disk.

    python examples/download.py                                 # facebook/opt-13b -> ./opt-13b (26 GB)
    python examples/download.py facebook/opt-125m --output opt-125m
    python examples/download.py path/to/checkpoint              # nothing is fetched: is it whole?

Only what is needed of a repository is fetched: configuration, tokenizer, and the weights in one form, safetensors if
they are there, otherwise PyTorch's .bin files. An interrupted download continues where it stopped.
Next: examples/split.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


# Slow imports wait until they are needed, so that --help answers at once.


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="facebook/opt-13b", help="hub id or local directory (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="where to put it (default: the name after the slash)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    return parser.parse_args()


def download(model: str, output: Path, revision: str | None) -> None:
    """Fetches the needed files of the hub id `model` into `output`."""
    from huggingface_hub import HfApi, snapshot_download

    files = HfApi().model_info(model, revision=revision).siblings or []
    weights = "*.safetensors" if any(f.rfilename.endswith(".safetensors") for f in files) else "pytorch_model*.bin"
    patterns = ["*.json", "*.txt", "*.model", weights]
    snapshot_download(model, revision=revision, local_dir=output, allow_patterns=patterns)


def check(directory: Path) -> None:
    """Prints what `directory` holds; raises ValueError or OSError if weights are missing, cut off or not an OPT's."""
    from transformers import AutoTokenizer, OPTConfig

    from optimum_opt_trn.checkpoint.hub import open_checkpoint
    from optimum_opt_trn.checkpoint.layout import checkpoint_files

    config = OPTConfig.from_pretrained(directory)
    if config.model_type != "opt":
        raise ValueError(f"{directory} is a model of type {config.model_type!r}, not an OPT.")
    # Opens every file (a safetensors file that was cut off is found out so) and compares names with the config.
    open_checkpoint(directory, checkpoint_files(config, "f32"))
    size = sum(file.stat().st_size for suffix in ("safetensors", "bin") for file in directory.glob(f"*.{suffix}"))
    print(
        f"{directory} is whole: OPT, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.max_position_embeddings} positions, {size / 1e9:.2f} GB of weights."
    )
    try:
        AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError):  # whichever class transformers tried last
        print("It has no tokenizer: enough for token ids; for text, put the tokenizer's files there.")


def main() -> int:
    arguments = parse_arguments()
    directory = Path(arguments.model)
    try:
        if not directory.is_dir():
            directory = arguments.output or Path(directory.name)
            download(arguments.model, directory, arguments.revision)
        elif arguments.output or arguments.revision:
            raise ValueError(f"{directory} is a local directory, and --output and --revision are for downloads.")
        check(directory)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Next: python examples/split.py {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
