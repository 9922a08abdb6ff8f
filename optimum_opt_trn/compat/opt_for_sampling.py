"""`OPTForSampling`: the OPT model of transformers-neuronx, as a layer over `NeuronOPTForCausalLM`."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..checkpoint.config import load_config
from ..checkpoint.hub import open_checkpoint
from ..checkpoint.layout import checkpoint_files, layer_file
from ..configuration_opt import OPTNeuronConfig, reject_unknown
from ..dtypes import normalize_dtype
from ..modeling_neuron_opt import NeuronOPTForCausalLM
from .options import GenerationConfig, NeuronConfig, buckets, check_environment, refuse


# The module that old scripts import from.
_OLD_NAMES = "optimum_opt_trn.compat.transformers_neuronx"

_GONE_METHODS = {
    "cpu_compile": "compile on any host with `optimum-cli export neuron`.",
    "enable_speculative_decoder": "generate() takes an assistant_model, without set-up. Leave it out.",
    "enable_token_tree_decoder": "generate() takes an assistant_model, without set-up. Leave it out.",
    "enable_window_context_decoder": "a prompt of any length is computed in one call. Leave it out.",
    "profile": "there is no device to profile on the cpu target. Use torch.profiler around sample().",
    "register_forward_hook": "this is no torch module; the steps of sample() can be timed with a streamer.",
    "register_forward_pre_hook": "this is no torch module; the steps of sample() can be timed with a streamer.",
    "register_to_neuron_hook": "to_neuron() shows a progress bar. Leave it out.",
    "reorder_cache": "call NeuronOPTForCausalLM.generate(), which keeps the cache to itself.",
    "setup_reorder_cache": "call NeuronOPTForCausalLM.generate(), which keeps the cache to itself.",
}


class OPTForSampling:
    """The old library's OPT model, made by `from_pretrained` and ready to `sample` after `to_neuron`."""

    def __init__(self, checkpoint: str, config: transformers.OPTConfig, export_options: dict[str, Any]):
        self._checkpoint = checkpoint
        self._export_options = export_options
        self._artifacts: str | None = None
        self._model: NeuronOPTForCausalLM | None = None
        self.config = config
        self.neuron_config = NeuronConfig()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_path: str | os.PathLike[str],
        batch_size: int | list[int] = 1,
        amp: str | None = None,
        tp_degree: int = 2,
        n_positions: int | list[int] = 2048,
        unroll: int | None = None,
        context_length_estimate: int | list[int] | None = None,
        context_unroll: int | None = 1,
        neuron_config: NeuronConfig | None = None,
        eager: bool = False,
        max_topk: int | None = None,
        **kwargs: Any,
    ) -> OPTForSampling:
        """Reads the configuration and checks the options. Weights are read, and graphs compiled, in `to_neuron`.

        Args:
            pretrained_model_path: a checkpoint, split or not: a directory or a hub id.
            batch_size: rows that `sample` takes at most; of a list, the largest counts.
            amp: dtype of attention, MLP and embedding (`f16`, `bf16`, `f32`), by default the checkpoint's dtype.
            tp_degree: tensor-parallel degree.
            n_positions: tokens that a row holds at most; a list names the cache lengths to compile graphs for.
            unroll, context_unroll: accepted with their defaults (all layers; 1).
            context_length_estimate: the length, or lengths, of prompts to compile graphs for. Longer ones work too.
            neuron_config: see `NeuronConfig`.
            eager: not in transformers-neuronx: run without compiling.
            max_topk: not in transformers-neuronx: the largest `top_k` of `sample`, by default 256.
            kwargs: `eos_token_id` and `pad_token_id`, in place of the checkpoint's.

        Raises:
            NotImplementedError: for an option that has no counterpart here, with the reason and the way out.
            TypeError: for an option that transformers-neuronx did not have either.
            ValueError: for a value out of range, or a checkpoint that is not of an OPT.
        """
        check_environment(os.environ)
        checkpoint = os.fspath(pretrained_model_path)
        config = load_config(checkpoint)
        _check_overrides(kwargs, config)
        config = copy.deepcopy(config)
        for name, value in kwargs.items():
            if value is not None:
                setattr(config, name, value)

        if unroll not in (None, config.num_hidden_layers):
            refuse("unroll", unroll, "the layers share one compiled graph. Leave it out")
        if context_unroll not in (None, 1, config.num_hidden_layers):
            refuse("context_unroll", context_unroll, "the layers share one compiled graph. Leave it out")
        weight_dtype = None
        if amp is not None and "-u8-" in amp:  # of activations, of weights, of what these are converted to
            amp, weight_dtype = amp.rpartition("-")[2], "int8"
        quant = getattr(neuron_config, "quant", None)
        if quant is not None:
            amp, weight_dtype = quant.dequant_dtype, "int8"
        length = n_positions if isinstance(n_positions, int) else max(n_positions)
        limit = config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"n_positions={length} exceeds the {limit} positions that the model was trained with "
                f"(max_position_embeddings): pass n_positions={limit} or less."
            )
        options = {
            "batch_size": batch_size if isinstance(batch_size, int) else max(batch_size),
            "sequence_length": length,
            "tp_degree": tp_degree,
            "amp": normalize_dtype(amp if amp is not None else config.dtype or "f32"),
            "weight_dtype": weight_dtype,
            "cache_buckets": None if isinstance(n_positions, int) else buckets("n_positions", n_positions, length),
            "prompt_buckets": buckets("context_length_estimate", context_length_estimate, length),
            "max_topk": max_topk,
            "eager": eager,
        }
        # Old scripts read these from `model.config`.
        config.n_positions, config.batch_size = length, options["batch_size"]
        config.amp, config.tp_degree = options["amp"], tp_degree
        model = cls(checkpoint, config, options)
        if neuron_config is not None:
            if not isinstance(neuron_config, NeuronConfig):
                kind = f"{type(neuron_config).__module__}.{type(neuron_config).__name__}"
                raise TypeError(f"neuron_config is a {kind}: import NeuronConfig from {_OLD_NAMES}.")
            model.neuron_config = neuron_config
        return model

    def to_neuron(self) -> None:
        """Reads the weights and compiles the graphs, or takes both from the directory given to `load`.

        Raises:
            ValueError: if what is in that directory was made with other options than this model.
        """
        if self._artifacts is None:
            options = {name: value for name, value in self._export_options.items() if value is not None}
            self._model = NeuronOPTForCausalLM.from_pretrained(self._checkpoint, **options)
            return
        how = {"eager": self._export_options["eager"], "trust_remote_code": self._trust_remote_code}
        model = NeuronOPTForCausalLM.from_pretrained(self._artifacts, **how)
        for name, value in self._export_options.items():
            saved = getattr(model.neuron_config, name, value)
            if value is not None and saved != value:
                raise ValueError(f"{self._artifacts} was saved with {name}={saved!r}, and this model has {value!r}.")
        if not _same_weights(self._artifacts, self._checkpoint, self.config, model.neuron_config):
            raise ValueError(f"{self._artifacts} was saved with other weights than those of {self._checkpoint}.")
        self._model = model

    def save(self, directory: str | os.PathLike[str], sharded_weights: bool = False) -> None:
        """Writes weights and compiled graphs to `directory`: an export, which NeuronOPTForCausalLM reads as well.

        `sharded_weights` asked for the weights as well; they are always written.
        """
        self._loaded().save_pretrained(directory)

    def load(self, directory: str | os.PathLike[str], trust_remote_code: bool = False) -> None:
        """Makes `to_neuron` take weights and compiled graphs from `directory`, where `save` put them.

        Graphs for Neuron devices that were compiled by somebody else are code: they need `trust_remote_code=True`.
        """
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"{os.fspath(directory)} is not a directory: give the one that save() wrote.")
        self._artifacts, self._trust_remote_code = os.fspath(directory), trust_remote_code

    @torch.no_grad()
    def sample(
        self,
        input_ids: Tensor,
        sequence_length: int,
        start_ids: Tensor | None = None,
        top_k: int = 50,
        streamer: Any = None,
    ) -> Tensor:
        """Samples up to `sequence_length` tokens among the `top_k` best at temperature 1, never the EOS token.

        With `NeuronConfig(on_device_generation=…)`, that configuration decides how tokens are chosen. A batch ends
        when all its rows have met their EOS token.

        Args:
            input_ids: prompts, (batch, prompt length), integer; shorter ones padded on the left.
            sequence_length: length of the result, prompt and padding included.
            start_ids: index of each row's first real token, (batch,), integer; None if nothing is padded. Only
                this says what is padding, not the value of tokens.
            top_k: how many of the best tokens to choose among.
            streamer: its `put` gets each step's new tokens, (batch, 1), and its `end` is called at the end.

        Returns:
            (batch, sequence_length), int64: the prompts and the tokens that follow. Prompts of that length or more
            are returned unchanged.

        Raises:
            RuntimeError: before `to_neuron`.
            ValueError: for a value out of range; the message names it and the limit.
        """
        model = self._loaded()
        mask = _attention_mask(input_ids, start_ids)
        length, limit = input_ids.shape[1], self.config.n_positions
        if sequence_length > limit:
            raise ValueError(f"sequence_length={sequence_length} exceeds n_positions={limit}: load with a higher one.")
        if length >= sequence_length:
            if streamer is not None:
                streamer.end()
            return input_ids.long().clone()
        eos = self.config.eos_token_id
        options: dict[str, Any] = {"max_length": sequence_length, "eos_token_id": eos}
        if self.neuron_config.on_device_generation is not None:
            eos = options["eos_token_id"] = self.neuron_config.on_device_generation.eos_token_id
            options.update(self.neuron_config.on_device_generation.generate_options())
        elif not 1 <= top_k <= self.config.vocab_size:
            raise ValueError(f"top_k={top_k} must be from 1 to the size of the vocabulary, {self.config.vocab_size}.")
        else:
            options.update(do_sample=True, top_k=top_k, top_p=1.0, temperature=1.0, min_length=sequence_length)
        first_eos = eos[0] if isinstance(eos, (list, tuple)) else eos
        with without_generation_config(model):
            return model.generate(
                input_ids.long(),
                attention_mask=mask,
                pad_token_id=self.config.pad_token_id if first_eos is None else first_eos,
                streamer=None if streamer is None else _NewTokens(streamer),
                **options,
            )

    @torch.no_grad()
    def forward(self, input_ids: Tensor, cache_ids: Tensor | None = None, start_ids: Tensor | None = None) -> Tensor:
        """Logits of the token after each prompt, (batch, vocabulary), float32; arguments as in `sample`.

        Raises:
            NotImplementedError: for `cache_ids` that continue an earlier call: the cache is not kept between calls.
        """
        length = input_ids.shape[-1]
        if cache_ids is not None and cache_ids.flatten().tolist() != list(range(length)):
            refuse("cache_ids", cache_ids.tolist(), "a call starts at position 0. Use sample() or generate()")
        mask = _attention_mask(input_ids, start_ids)
        return self._loaded()(input_ids.long(), attention_mask=mask, logits_to_keep=1).logits[:, -1]

    __call__ = forward

    def update_generation_config(self, generation_config: GenerationConfig) -> None:
        """Makes `sample` use `generation_config` from now on."""
        self.neuron_config.on_device_generation = generation_config

    def reset(self) -> None:
        """Does nothing: a call always starts with an empty cache. Old scripts called this between prompts."""

    def eval(self) -> OPTForSampling:
        """Does nothing: there is no other mode."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _GONE_METHODS:
            raise AttributeError(f"OPTForSampling.{name} has no counterpart here: {_GONE_METHODS[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _loaded(self) -> NeuronOPTForCausalLM:
        if self._model is None:
            raise RuntimeError("The model is not loaded yet: call to_neuron() first.")
        return self._model


class _NewTokens(BaseStreamer):
    """Calls a streamer as the old loop did: only with new tokens, as (batch, 1), and not with the prompt."""

    def __init__(self, streamer: Any):
        self._streamer = streamer
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self._streamer.put(value.reshape(-1, 1))
        self._seen_prompt = True

    def end(self) -> None:
        self._streamer.end()


@contextmanager
def without_generation_config(model: NeuronOPTForCausalLM) -> Iterator[None]:
    """Hides generation_config.json, of which the old loop knew nothing."""
    with model.engine.lock:
        kept, model.generation_config = model.generation_config, transformers.GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = kept


def _check_overrides(overrides: dict[str, Any], config: transformers.OPTConfig) -> None:
    """Refuses keyword arguments that replace values of config.json, except special tokens."""
    network = ("activation_function", "ffn_dim", "hidden_size", "max_position_embeddings", "num_attention_heads")
    network += ("num_hidden_layers", "vocab_size", "word_embed_proj_dim")  # type: ignore[assignment]
    signature = inspect.signature(OPTForSampling.from_pretrained).parameters
    reject_unknown(overrides, (*signature, *network, "eos_token_id", "pad_token_id"), "OPTForSampling.from_pretrained")
    for name in network:
        if overrides.get(name) not in (None, getattr(config, name)):
            refuse(name, overrides[name], f"the checkpoint has {getattr(config, name)!r}. Change its config.json")


def _same_weights(left: str, right: str, config: transformers.OPTConfig, made: OPTNeuronConfig) -> bool:
    """Whether two checkpoints have the same last layer once it is in the dtypes of `made`."""
    files = checkpoint_files(config, made.amp, made.weight_dtype)
    one, other = (open_checkpoint(checkpoint, files).weights for checkpoint in (left, right))
    names = files[layer_file(config.num_hidden_layers - 1)]
    return all(torch.equal(one.read(name), other.read(name)) for name in names)


def _attention_mask(input_ids: Tensor, start_ids: Tensor | None) -> Tensor:
    """(batch, prompt length), int64: 1 from each row's first real token on."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: (batch, prompt length) is needed.")
    batch, length = input_ids.shape
    if start_ids is None:
        return torch.ones(batch, length, dtype=torch.long)
    starts = torch.as_tensor(start_ids)
    if starts.shape != (batch,) or bool(((starts < 0) | (starts >= length)).any()):
        raise ValueError(f"start_ids={starts.tolist()} must be {batch} indices from 0 to {length - 1}, one per row.")
    return (torch.arange(length) >= starts[:, None]).long()
