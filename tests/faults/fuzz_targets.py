"""What reads files that somebody else may have written: one function for each kind of file, for the fuzzers.

A target puts bytes in the place of one file of a small sound export or checkpoint, reads it as users' calls do, and
puts the sound file back. Reading may succeed, or raise one of `ANSWERS`, which commands print as one line. Anything
else is a finding. `test_fuzz_targets.py` feeds the targets by hypothesis, `fuzz_atheris.py` by coverage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_models import SHIPPED_MODEL, tiny_opt
from transformers import OPTConfig

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.checkpoint.config import load_config
from optimum_opt_trn.checkpoint.hub import open_checkpoint
from optimum_opt_trn.checkpoint.layout import INDEX_NAME, checkpoint_files
from optimum_opt_trn.checkpoint.small_files import load_tokenizer, save_config
from optimum_opt_trn.checkpoint.verify import find_problems, find_unlisted
from optimum_opt_trn.checkpoint.write import write_split
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.planning.memory import check_model
from optimum_opt_trn.targets import TargetError


ANSWERS = (ValueError, OSError, TypeError, TargetError)

SIZES = {"vocab_size": 8, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": 1, "max_position_embeddings": 16}


@dataclass(frozen=True)
class Target:
    """A file of the workspace, and what reads it."""

    file: str
    read: Callable[[Path], None]


def load(root: Path) -> None:
    """Loads the export; if that succeeds, it generates tokens of the vocabulary."""
    model = NeuronOPTForCausalLM.from_pretrained(root / "export")
    tokens = model.generate(torch.tensor([[2, 3]]), max_new_tokens=2, do_sample=False)
    assert tokens.shape[0] == 1 and int(tokens.min()) >= 0 and int(tokens.max()) < model.config.vocab_size


def verify(root: Path) -> None:
    """Verifying says what is wrong; it does not raise. What it finds sound loads."""
    if not find_problems(root / "export"):
        find_unlisted(root / "export")
        load(root)


def verify_split(root: Path) -> None:
    if not find_problems(root / "split"):
        find_unlisted(root / "split")
        split(root, "split")


def configuration(root: Path) -> None:
    config = load_config(root / "export")
    check_model(config, OPTNeuronConfig(sequence_length=8, tp_degree=2))


def tokenizer(root: Path) -> None:
    load_tokenizer(root / "tokenizer")("Hello, my")


def adapter(root: Path) -> None:
    split(root, "safetensors", adapter=[str(root / "adapter")])


def split(root: Path, source: str, adapter: Sequence[str] = ()) -> None:
    """Splits a source. Of a broken one there is no index, and what is written is what verification calls sound."""
    shutil.rmtree(root / "out", ignore_errors=True)
    config = OPTConfig(**SIZES)
    try:
        weights = open_checkpoint(root / source, checkpoint_files(config, "f16"), adapter=adapter).weights
        write_split(weights, root / "out", "f16", partial(save_config, config, "f16"))
    except ANSWERS:
        assert not (root / "out" / INDEX_NAME).exists()
        raise
    assert not find_problems(root / "out")


TARGETS: dict[str, Target] = {
    "config.json": Target("export/config.json", configuration),
    "config.json of an export": Target("export/config.json", load),
    "neuron_config.json": Target("export/neuron_config.json", load),
    "generation_config.json": Target("export/generation_config.json", load),
    "export manifest": Target("export/export_manifest.json", verify),
    "manifest of compiled files": Target("export/compiled/manifest.json", load),
    "safetensors of weights": Target("export/checkpoint/layer_000.safetensors", load),
    "safetensors of compiled files": Target("export/compiled/layer_000.safetensors", load),
    "split manifest": Target("split/split_manifest.json", verify_split),
    "index": Target(f"split/{INDEX_NAME}", partial(split, source="split")),
    "safetensors of a source": Target("safetensors/model.safetensors", partial(split, source="safetensors")),
    "pickle": Target("pickle/pytorch_model.bin", partial(split, source="pickle")),
    "pickle before PyTorch 1.6": Target("old pickle/pytorch_model.bin", partial(split, source="old pickle")),
    "index of transformers-neuronx": Target(
        "old split/pytorch_model.bin/key_to_filename.json", partial(split, source="old split")
    ),
    "adapter_config.json": Target("adapter/adapter_config.json", adapter),
    "safetensors of an adapter": Target("adapter/adapter_model.safetensors", adapter),
    "tokenizer.json": Target("tokenizer/tokenizer.json", tokenizer),
    "tokenizer_config.json": Target("tokenizer/tokenizer_config.json", tokenizer),
}


def make_workspace(root: Path) -> None:
    """Writes what the targets read, sound, below `root`."""
    model = tiny_opt(**SIZES)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name in ("safetensors", "pickle", "old pickle", "old split", "tokenizer"):
        (root / name).mkdir()
        model.config.save_pretrained(root / name)
    save_file(state, root / "safetensors" / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, root / "pickle" / "pytorch_model.bin")
    torch.save(state, root / "old pickle" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (root / "old split" / "pytorch_model.bin").mkdir()
    names = {name: f"p{index}.{name}" for index, name in enumerate(state)}
    for name, tensor in state.items():
        torch.save(tensor, root / "old split" / "pytorch_model.bin" / names[name])
    (root / "old split" / "pytorch_model.bin" / "key_to_filename.json").write_text(json.dumps(names))
    _small_tokenizer(root / "tokenizer")
    _small_adapter(root / "adapter")
    config = OPTConfig(**SIZES)
    source = open_checkpoint(root / "safetensors", checkpoint_files(config, "f16"))
    write_split(source.weights, root / "split", "f16", partial(save_config, config, "f16"))
    export_opt(root / "safetensors", root / "export", OPTNeuronConfig(sequence_length=16))


def _small_adapter(directory: Path) -> None:
    """A LoRA adapter, as PEFT writes it."""
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.model.decoder.layers.0.self_attn.q_proj"
    matrices = {f"{prefix}.lora_A.weight": torch.ones(2, 8), f"{prefix}.lora_B.weight": torch.ones(8, 2)}
    save_file(matrices, directory / "adapter_model.safetensors")


def _small_tokenizer(directory: Path) -> None:
    """The shipped model's tokenizer with a vocabulary of a few hundred tokens: fuzzers read it thousands of times."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SHIPPED_MODEL / name, directory)
    content = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text())
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])[:300]
    content["model"]["vocab"] = dict(vocabulary)
    known = content["model"]["vocab"].keys()

    def of_known(merge: str | list[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return {left, right, left + right} <= known

    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if of_known(merge)]
    (directory / "tokenizer.json").write_text(json.dumps(content))


def run(name: str, content: bytes, root: Path) -> Exception | None:
    """Reads `content` in the place of a target's file.

    Returns:
        What reading raised that answers the user; None if it succeeded. A finding is raised.
    """
    target = TARGETS[name]
    file = root / target.file
    sound = file.read_bytes()
    try:
        file.unlink()  # weights may be linked
        file.write_bytes(content)
        target.read(root)
    except ANSWERS as answer:
        assert str(answer), repr(answer)
        return answer
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(sound)
    return None
