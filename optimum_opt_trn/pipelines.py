"""`pipeline`: transformers' text-generation pipeline on an OPT export, on any host."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextGenerationPipeline
from transformers.generation import GenerationMixin

from .checkpoint.config import load_config
from .checkpoint.listing import record
from .checkpoint.small_files import load_tokenizer
from .configuration_opt import reject_unknown
from .export import find_export
from .generation.transformers_versions import default_new_tokens
from .modeling_neuron_opt import NeuronOPTForCausalLM, export_options


TASK = "text-generation"

# How many prompts a call of the model gets for each slot: a slot goes to the next prompt as soon as it is free.
PROMPTS_OF_A_SLOT = 8


class OPTTextGenerationPipeline(TextGenerationPipeline):
    """transformers' pipeline, with its default of 256 new tokens limited to the export's length.

    With a streamer, calls of the model have no more prompts than slots.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._given_length = _gives_length(kwargs)
        super().__init__(*args, **kwargs)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See transformers' TextGenerationPipeline."""
        streamer = kwargs.get("streamer", self._forward_params.get("streamer"))
        if streamer is not None and kwargs.get("batch_size") is None and self._batch_size is not None:
            kwargs["batch_size"] = min(self._batch_size, self.model.neuron_config.batch_size)
        return super().__call__(inputs, *args, **kwargs)

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        default = default_new_tokens(self)
        if default is not None and not self._given_length and not _gives_length(generate_kwargs):
            mask = model_inputs.get("attention_mask")
            longest = model_inputs["input_ids"].shape[1] if mask is None else int(mask.sum(-1).max())
            # At least 1, so that a prompt that leaves no room raises the error that explains it.
            room = max(1, self.model.neuron_config.sequence_length - longest)
            generate_kwargs["max_new_tokens"] = min(default, room)
        return super()._forward(model_inputs, **generate_kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in transformers: the export and the tokenizer, which has padding on the left here."""
        super().save_pretrained(save_directory, **kwargs)
        record(Path(save_directory))


def pipeline(
    task: str | None = None,
    model: str | Path | NeuronOPTForCausalLM | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    feature_extractor: Any = None,
    image_processor: Any = None,
    use_fast: bool = True,
    export: bool = False,
    input_shapes: dict[str, int] | None = None,
    compiler_args: dict[str, Any] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    **kwargs: Any,
) -> TextGenerationPipeline:
    """A text-generation pipeline, with the signature of `optimum.neuron.pipeline`.

    Args:
        task: `"text-generation"`, also the meaning of None.
        model: an export (directory or Hub id), a loaded model, or, with `export=True`, an OPT checkpoint.
        tokenizer: by default, the one in the model's directory.
        use_fast: for loading the tokenizer.
        trust_remote_code: loads an export for `neuron` that was compiled by somebody else, and code of a tokenizer.
        export: export `model` first, to a temporary directory. The export's options (`batch_size`,
            `sequence_length`, `tensor_parallel_size`, `amp`, `kv_cache_dtype`, …, see
            `NeuronOPTForCausalLM.get_neuron_config`) go into `kwargs`.
        token, revision: for the Hub.
        feature_extractor, image_processor, input_shapes, compiler_args: only part of the signature. OPT has no use
            for the first two; shapes and compilation are options of the export.
        kwargs: `batch_size` (prompts in a call to the model, by default eight for each row that it was exported for;
            with `export=True`, rows to export it for), `num_workers`, `eager` (run without kernels), and the options
            of the pipeline and of `generate`, as defaults for each call. Without a length, 256 new tokens, or as many
            as `sequence_length` leaves room for.

    Returns:
        A `transformers.TextGenerationPipeline`. Prompts of different lengths in a batch do not change each other's
        results.

    Raises:
        ValueError: for another task, no model, a model that is not exported (or already is), no tokenizer, a batch
            size below 1, an argument that has no meaning here.
        TypeError: for an unknown option; the message names the nearest one.
        OSError: if the model cannot be found.
    """
    if task not in (None, TASK):
        raise ValueError(f"task={task!r}: OPT does {TASK!r}; leave the task out or give that one.")
    if model is None:
        raise ValueError("pipeline() needs a model: an export directory, a Hub id, or a NeuronOPTForCausalLM.")
    for name, value in (("feature_extractor", feature_extractor), ("image_processor", image_processor)):
        if value is not None:
            raise ValueError(f"{name} has no meaning for OPT, which reads text: leave it out.")
    for name, shapes in (("input_shapes", input_shapes), ("compiler_args", compiler_args)):
        if shapes:
            raise ValueError(
                f"{name}={shapes!r} has no meaning here: give batch_size, sequence_length, tensor_parallel_size, amp "
                "and the like by name, with export=True."
            )
    batch_size = kwargs.pop("batch_size", None)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be a positive whole number.")
    of_loading = {*export_options(), "eager"} - {"batch_size"}
    reject_unknown(kwargs, of_loading | _call_options(), "pipeline()")
    loading = {name: kwargs.pop(name) for name in of_loading & kwargs.keys()}

    hub = {"token": token, "revision": revision}
    if isinstance(model, NeuronOPTForCausalLM):
        if export or loading:
            what = "export=True" if export else ", ".join(loading)
            raise ValueError(f"{what} has no effect on a model that is loaded already: leave it out.")
        if tokenizer is None:
            tokenizer = next((p for p in model.preprocessors if isinstance(p, PreTrainedTokenizerBase)), None)
    else:
        _check_exported(model, export, hub)
        if tokenizer is None:
            tokenizer = model
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _load_tokenizer(tokenizer, use_fast=use_fast, trust_remote_code=trust_remote_code, **hub)
    if tokenizer is None:
        raise ValueError("The model came without a tokenizer: pass tokenizer=.")
    if not isinstance(model, NeuronOPTForCausalLM):
        if export:
            loading["batch_size"] = batch_size
        loading["trust_remote_code"] = trust_remote_code
        model = NeuronOPTForCausalLM.from_pretrained(model, **hub, **loading)

    if batch_size is None or export:
        batch_size = PROMPTS_OF_A_SLOT * model.neuron_config.batch_size
    return transformers.pipeline(
        TASK,
        pipeline_class=OPTTextGenerationPipeline,
        model=model,
        tokenizer=_batching(tokenizer, model),
        batch_size=batch_size,
        device=model.device,
        **kwargs,
    )


def _check_exported(model: str | Path, export: bool, hub: dict[str, Any]) -> None:
    """Raises ValueError unless `model` is an export or `export` is set, not both; OSError if it is not found."""
    load_config(model, **hub)
    exported = find_export(model, hub) is not None
    if export and exported:
        raise ValueError(f"{model} is an export already: leave export=True out.")
    if not export and not exported:
        raise ValueError(
            f"{model} is not an export, it has no neuron_config.json: pass export=True, or export it with "
            f"`optimum-cli export neuron -m {model} OUT` and load OUT."
        )


def _load_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(source, **options)
    except ValueError as error:
        raise ValueError(f"{error}: pass tokenizer=.") from error


def _batching(tokenizer: PreTrainedTokenizerBase, model: NeuronOPTForCausalLM) -> PreTrainedTokenizerBase:
    """`tokenizer`, or a copy that can batch (with a pad token, padding on the left) and knows the longest prompt."""
    limit = model.neuron_config.sequence_length
    if tokenizer.pad_token is not None and tokenizer.padding_side == "left" and tokenizer.model_max_length <= limit:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    # Our model gives each row the same result on either side; transformers warns about the right one.
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)  # which handle_long_generation="hole" reads
    if tokenizer.pad_token is None:
        pad = model.config.pad_token_id
        if pad is None or pad >= len(tokenizer):
            pad = tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def _gives_length(options: dict[str, Any]) -> bool:
    return bool(options.keys() & {"max_new_tokens", "max_length", "generation_config"})


def _call_options() -> set[str]:
    """The options of the pipeline and of `generate`, which are defaults for each call."""
    takers = (TextGenerationPipeline._sanitize_parameters, TextGenerationPipeline.preprocess, GenerationMixin.generate)
    names = {name for taker in takers for name in inspect.signature(taker).parameters}
    names |= {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    names -= {"self", "kwargs", "generate_kwargs", "inputs", "prompt_text", "transformers_version"}
    return names | {"num_workers"}
