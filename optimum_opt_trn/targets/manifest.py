"""What a manifest of compiled artifacts says, on every target."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import OPTConfig

from ..configuration_opt import OPTNeuronConfig
from ..sharding import cache_shape


MANIFEST_NAME = "manifest.json"


def graph_key(config: OPTConfig, neuron_config: OPTNeuronConfig, modules: Iterable[ModuleType], *more: Any) -> str:
    """A hash of all that graphs are made of: the model's shape, the export's options, the code, and `more`."""
    options = {k: v for k, v in neuron_config.options().items() if not k.startswith("checkpoint_")}
    model = (
        *(config.hidden_size, config.ffn_dim, config.vocab_size, config.word_embed_proj_dim),
        *(config.enable_bias, config.layer_norm_elementwise_affine, config.do_layer_norm_before),
        *(config._remove_final_layer_norm, config.tie_word_embeddings, config.activation_function),
    )
    described = (model, *more, cache_shape(config, neuron_config), sorted(options.items()))
    digest = hashlib.sha256(repr(described).encode())
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
