"""OPT checkpoints of the published shapes with random weights, and what is in a checkpoint's files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any


# Where the published configurations differ (facebook/opt-*, config.json).
SHAPES: dict[str, dict[str, Any]] = {
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "350m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32},
    "2.7b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32},
    "6.7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    # No published one: to try the harness.
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
}
SEED = 20240517
# As transformers initialises an OPT (OPTConfig.init_std); layernorms are about 1, not exactly.
STD = 0.02

Header = dict[str, tuple[tuple[int, ...], int]]


def shape_options(shape: str, layers: int | None = None) -> dict[str, Any]:
    """What `OPTConfig` is made with; with so many `layers` instead of the shape's own."""
    options = {"vocab_size": 50272, "max_position_embeddings": 2048, **SHAPES[shape]}
    options.setdefault("word_embed_proj_dim", options["hidden_size"])
    options["ffn_dim"] = 4 * options["hidden_size"]
    if layers is not None:
        options["num_hidden_layers"] = layers
    return options


def make_checkpoint(shape: str, directory: Path, layers: int | None = None) -> Path:
    """Writes the checkpoint in float16, a file for each layer, unless it is there; `directory`.

    Peak memory is one file's tensors in float32. It is written beside and renamed when it is whole.
    """
    if (directory / "config.json").is_file():
        return directory
    import torch
    from safetensors.torch import save_file
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**shape_options(shape, layers), dtype=torch.float16)
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in OPTForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in names:  # a tied head is the embedding, and is not named
        layer = re.search(r"\.layers\.(\d+)\.", name)
        files.setdefault(f"model-{int(layer[1]) + 1 if layer else 0:05d}.safetensors", []).append(name)

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    for file, held in sorted(files.items()):
        tensors = {}
        for name in held:
            values = torch.empty(names[name]).normal_(0, STD, generator=generator)
            tensors[name] = (values + 1.0 if name.endswith("layer_norm.weight") else values).half()
        save_file(tensors, partial / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(partial, config.vocab_size)
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(partial)
    os.rename(partial, directory)
    return directory


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Token i is `t{i}`; some converters want a tokenizer."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = special + [f"t{index}" for index in range(len(special), vocab_size)]
    (directory / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    named = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **named}))


def read_headers(directory: Path) -> Header:
    """Shape and bytes of every tensor in the safetensors files of `directory`."""
    found: Header = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:
            entries = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in entries.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = tuple(entry["shape"]), end - start
    return found


def read_weights(header: Header) -> Header:
    """Of `header`, what one step reads whole: all but the tables of which it takes a row for each token."""
    tables = ["embed_positions.weight"]
    if "lm_head.weight" in header:  # else the embedding is the head
        tables.append("embed_tokens.weight")
    return {name: entry for name, entry in header.items() if not name.endswith(tuple(tables))}


def weight_bytes(header: Header, matrix_itemsize: int | None = None) -> int:
    """Bytes of weights that a step reads: as they are in the file, or with matrices of so many bytes an element."""
    total = 0
    for shape, size in read_weights(header).values():
        if matrix_itemsize is not None and len(shape) == 2:
            size = shape[0] * shape[1] * matrix_itemsize
        total += size
    return total


def unread_head_bytes(export: Path) -> int:
    """By how much fewer bytes of the head our export's greedy steps read, which read a copy of it (docs/speed.md)."""
    copy = read_headers(export / "compiled")
    if "lm_head.weight_int8" not in copy:
        return 0
    header = read_headers(export / "checkpoint")
    head = header.get("lm_head.weight", header["model.decoder.embed_tokens.weight"])[1]
    return head - sum(copy[f"lm_head.{name}"][1] for name in ("weight_int8", "weight_scale", "error"))


def cache_bytes(config: dict[str, Any], batch_size: int, context: float, itemsize: int) -> float:
    """Bytes of keys and values that a step reads with so many positions filled in each row."""
    return 2 * config["num_hidden_layers"] * batch_size * context * config["hidden_size"] * itemsize
