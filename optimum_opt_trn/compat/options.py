"""The options of transformers-neuronx: those that have a counterpart here, and why the others have none.

Every option is mapped, or refused by name with a way out. The default value of an option is always accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..configuration_opt import reject_unknown


_LAYOUT = "it chose a memory layout for the old compiler and changed no result. Leave it out"
_KERNEL = "it chose a kernel of the old library and changed no result. Leave it out"
_OTHER_MODELS = "it was for models of other kinds than OPT. Leave it out"
_CACHE_QUANT = "the cache is kept in f16, bf16 or f32. Leave it out"
_BATCHING = (
    "a batch starts together here. Leave it out; rows of different lengths are padded on the left, with start_ids"
)
_DISTRIBUTION = "the ranks exchange float32 sums here. Leave it out"

# field -> (its default, the reason why any other value is refused, or None if others are accepted)
_NEURON_CONFIG_FIELDS: dict[str, tuple[Any, str | None]] = {
    "on_device_generation": (None, None),
    "on_device_embedding": (False, None),  # the embedding is always part of the graphs
    "sparse_attn": (None, "every token attends to all tokens before it, as OPT was trained. Leave it out"),
    "quant": (None, None),
    "kv_cache_quant": (None, _CACHE_QUANT),
    "continuous_batching": (None, _BATCHING),
    "attention_layout": ("HSB", _LAYOUT),
    "collectives_layout": ("HSB", _LAYOUT),
    "cache_layout": ("SBH", _LAYOUT),
    "padding_side": ("left", _BATCHING),
    "use_2d_cache_ids": (False, _BATCHING),
    "lhs_aligned": (False, _BATCHING),
    "group_query_attention": (None, _OTHER_MODELS),
    "sequence_parallel_norm": (False, _OTHER_MODELS),
    "sequence_parallel_norm_threshold": (2048, _OTHER_MODELS),
    "bf16_rms_norm": (False, _OTHER_MODELS),
    "all_reduce_dtype": (None, _DISTRIBUTION),
    "cast_logits_dtype": ("float32", "logits are float32. Leave it out"),
    "fuse_qkv": (False, _LAYOUT),
    "qkv_tiling": (False, _LAYOUT),
    "weight_tiling": (False, _LAYOUT),
    "mlp_in_weight_tiling_permute_order": ([1, 2, 0, 3], _LAYOUT),
    "mlp_out_weight_tiling_permute_order": ([1, 2, 0, 3], _LAYOUT),
    "log_softmax_scores": (False, "sample() returns tokens only. Compute log_softmax from the logits of forward()"),
    "shard_over_sequence": (False, "the cache is cut by heads. Leave it out"),
    "duplicate_q_weight_sos": (False, "the cache is cut by heads. Leave it out"),
    "output_all_logits": (False, "use NeuronOPTForCausalLM.forward(), which returns the logits of every position"),
    "attn_output_transposed": (False, _LAYOUT),
    "fused_rmsnorm_qkv": (False, _OTHER_MODELS),
    "fused_rmsnorm_mlp": (False, _OTHER_MODELS),
    "mlp_out_weight_transpose": (False, _LAYOUT),
    "fuse_mlp": (False, _KERNEL),
    "is_eagle_target": (False, _OTHER_MODELS),
    "is_eagle_draft": (False, _OTHER_MODELS),
    "has_pre_attention_norm": (True, _OTHER_MODELS),
    "compilation_worker_count": (None, "the layers share one compiled graph. Leave it out"),
}


def refuse(option: str, value: Any, reason: str) -> None:
    """Raises NotImplementedError that names the option, its value, the reason and the way out."""
    raise NotImplementedError(f"{option}={value!r} of transformers-neuronx has no counterpart: {reason}.")


class QuantizationConfig:
    """The old library's int8 weights, computed with in another dtype.

    Args:
        quant_dtype: `s8`.
        dequant_dtype: dtype of biases, embedding and head: `f16`, `bf16` or `f32`.
        quantize_method: `vector_dynamic`, a scale for each output channel.
        quantize_attn: True, as the MLP is.
        no_quantize_list: None.

    Raises:
        NotImplementedError: for another scheme.
    """

    def __init__(
        self,
        quant_dtype: str = "s8",
        dequant_dtype: str = "f16",
        quantize_method: str = "vector_dynamic",
        quantize_attn: bool = True,
        no_quantize_list: Sequence[str] = (),
    ):
        only: dict[str, tuple[Any, Any]] = {
            "quant_dtype": (quant_dtype, "s8"),
            "quantize_method": (quantize_method, "vector_dynamic"),
            "quantize_attn": (quantize_attn, True),
            "no_quantize_list": (list(no_quantize_list), []),
        }
        for name, (value, served) in only.items():
            if value != served:
                reason = "attention, MLP and head are int8 with a scale for each output channel. Leave it out"
                refuse(f"QuantizationConfig({name})", value, reason)
        self.quant_dtype, self.dequant_dtype = quant_dtype, dequant_dtype


class NeuronConfig:
    """The old library's optional features. Only those that have a counterpart here are accepted.

    Args:
        on_device_generation: a `GenerationConfig` that `OPTForSampling.sample` then follows.
        on_device_embedding: accepted; the embedding is always part of the graphs.
        quant: a `QuantizationConfig`, for int8 weights.
        Others: only with their default.

    Raises:
        NotImplementedError: for an option that was set and has no counterpart, with the reason.
        TypeError: for an option that transformers-neuronx did not have either.
    """

    def __init__(self, **options: Any):
        reject_unknown(options, _NEURON_CONFIG_FIELDS, "NeuronConfig")
        for name, value in options.items():
            default, reason = _NEURON_CONFIG_FIELDS[name]
            # Layouts were given as strings or as members of an enumeration.
            if reason is not None and getattr(value, "value", value) != default:
                refuse(f"NeuronConfig({name})", value, reason)
        self.on_device_generation: GenerationConfig | None = options.get("on_device_generation")
        self.quant: QuantizationConfig | None = options.get("quant")
        self.on_device_embedding: bool = bool(options.get("on_device_embedding", False))


class GenerationConfig:
    """How tokens are chosen with `NeuronConfig(on_device_generation=…)`. Keyword-only, as in the old library.

    Args:
        do_sample: whether to sample instead of taking the best token; `dynamic` always samples.
        top_k: tokens to choose among; None for all of them.
        top_p, temperature: as in transformers.
        eos_token_id: the token, or tokens, that end a row; None if no token does.
        dynamic: accepted: settings can be changed at any time here (`OPTForSampling.update_generation_config`).
        Others: only with their default.

    Raises:
        NotImplementedError: for an option that was set and has no counterpart, with the reason.
    """

    def __init__(
        self,
        *,
        max_length: int | None = None,
        do_sample: bool = False,
        top_k: int | None = 50,
        top_p: float = 1.0,
        top_p_min_tokens: int = 1,
        global_top_k: int | None = None,
        eos_token_id: int | list[int] | None = None,
        temperature: float = 1.0,
        dynamic: bool = False,
        deterministic: bool = False,
        per_batch_line: bool = False,
    ):
        refused: Iterable[tuple[str, Any, Any, str]] = (
            ("max_length", max_length, None, "the length is the sequence_length that sample() is called with"),
            ("top_p_min_tokens", top_p_min_tokens, 1, "top_p keeps one token at the least. Leave it out"),
            ("global_top_k", global_top_k, None, "it approximated top_k. Leave it out"),
            ("deterministic", deterministic, False, "use torch.manual_seed to repeat a sample"),
            ("per_batch_line", per_batch_line, False, "a call has one set of sampling parameters. Call per row"),
        )
        for name, value, default, reason in refused:
            if value != default:
                refuse(f"GenerationConfig({name})", value, reason)
        self.do_sample = do_sample
        self.top_k = top_k
        self.top_p = top_p
        self.eos_token_id = eos_token_id
        self.temperature = temperature
        self.dynamic = dynamic

    def generate_options(self) -> dict[str, Any]:
        """The same as keyword arguments of `generate()`: all of them, so that no default of the model applies."""
        if not (self.do_sample or self.dynamic):
            return {"do_sample": False}
        top_k = 0 if self.top_k is None else self.top_k
        return {"do_sample": True, "top_k": top_k, "top_p": self.top_p, "temperature": self.temperature}


def buckets(option: str, value: int | list[int] | tuple[int, ...] | None, longest: int) -> tuple[int, ...] | None:
    """A length or a list of them as ascending bucket sizes that end with `longest`; None stays None.

    Raises:
        ValueError: if one of them is above `longest`.
        NotImplementedError: for 0 (no graph for prompts).
    """
    if value is None:
        return None
    sizes = sorted({*([value] if isinstance(value, int) else value)})
    if not sizes or sizes[0] <= 0:
        refuse(option, value, "a prompt is always computed by a graph of its own. Leave it out")
    if sizes[-1] > longest:
        raise ValueError(f"{option}={value} exceeds n_positions={longest}: choose at most {longest}.")
    return tuple(sorted({*sizes, longest}))


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses settings in environment variables that the old library read and that have no counterpart here.

    Raises:
        NotImplementedError: if NEURON_PP_STAGES asks for pipeline parallelism.
    """
    stages = environment.get("NEURON_PP_STAGES", "1")
    if stages != "1":
        refuse("NEURON_PP_STAGES", stages, "layers are not spread over hosts. Unset it, and use a higher tp_degree")
