"""`generate()`: the adapter from transformers' GenerationMixin to the engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import CandidateGenerator, GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import ModelOutput

from ..model.sampling import SamplingInputs
from ..targets import StepResult
from .arguments import (
    check_options,
    ids_with_embeddings,
    inferred_mask,
    keep_in_room,
    unpack_prompts,
)
from .batches import Batches
from .cache import SlotCache, own_cache
from .forward import OPTForwardMixin
from .inner import InnerRecord
from .inputs import check_embeddings, check_inputs, check_room, check_vocabulary
from .refusals import refuse_arguments, refuse_options
from .samplers import make_sampler
from .transformers_versions import (
    ARGUMENTS,
    CACHE,
    VersionedGenerationMixin,
    is_default_length,
    length_is_default,
    mark_default_length,
    prepare_options,
    restore_mask,
    settle_arguments,
)


_BESIDE_IDS = "_columns_beside_ids"  # an attribute of a prepared GenerationConfig

# What transformers' loops take out of the arguments that go to forward().
_FORWARDED = ("tokenizer", "assistant_tokenizer", "trust_remote_code")


class OPTGenerationMixin(OPTForwardMixin, VersionedGenerationMixin):
    """`generate()` on an engine; the result of a row does not depend on the other rows.

    transformers' own loops run on `forward()`. Greedy search and sampling run in the engine's loop, with the tokens
    sampled on the device where it can do what was asked for.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_cache_class = True

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """transformers' `generate()`; see there. Prompts and options are checked before anything else happens.

        `inputs` may also be tokens in lists or arrays, or what a tokenizer returned.

        More prompts than the export has slots run in batches, one after the other. Calls of several threads are served
        in turn. Where processes share the model, all of them make this call; the random numbers of the first count.

        Raises:
            ValueError: for a prompt that is empty, too long, or holds ids outside of the vocabulary; for more tokens
                than the export was made for; for more beams; for options and a cache that do not fit. A cache that
                was passed is then as it was.
            TypeError: for an unknown option, naming the nearest; for text instead of token ids.
            NotImplementedError: for what no export serves, by its name; see `refusals.py`; and for what this one
                does not, see `Runtime.unserved`.
        """
        inputs, kwargs = unpack_prompts(inputs, {**kwargs, **dict(zip(ARGUMENTS, args, strict=False))})
        settle_arguments(generation_config, kwargs)
        refuse_arguments(kwargs)
        asked, others = prepare_options(self, generation_config, kwargs)
        if kwargs.get("custom_generate") is None:  # which has arguments of its own
            check_options(asked, others, {*ARGUMENTS, *_FORWARDED, *inspect.signature(self.forward).parameters})
        refuse_options(asked)
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        for name, reason in self.runtime.unserved.items():
            if embeds is not None if name == "inputs_embeds" else getattr(asked, name):
                raise NotImplementedError(f"generate({name}=…) is not served: {reason}.")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if embeds is not None:
            input_ids = ids_with_embeddings(embeds, input_ids, asked, kwargs)
        elif input_ids is None:  # then it begins with bos_token_id
            input_ids = self._prepare_model_inputs(None, asked.bos_token_id, dict(others))[0]
        with self.engine.generating(assists_itself=kwargs.get("assistant_model") is self):
            # Before anything that may raise in only one of several processes.
            self.runtime.begin(input_ids, *(given for given in (mask, embeds) if given is not None))
            mask_of_all = self._check_prompts(input_ids, embeds, mask, asked)
            if embeds is not None:  # transformers would make one of ids, of which there may be fewer
                kwargs["attention_mask"] = mask_of_all.long()
            if is_default_length(generation_config, kwargs):
                room = self.neuron_config.sequence_length - int(mask_of_all.sum(-1).max())
                # At least 1, so that a prompt that leaves no room is refused by its own error.
                kwargs["max_new_tokens"] = max(1, min(asked.max_new_tokens, room))
            batches = Batches(input_ids, asked, kwargs, self.neuron_config.batch_size)
            if len(batches) > 1 and not self._takes_any_number(asked, kwargs):
                return batches.run(super().generate, generation_config)
            return super().generate(input_ids, generation_config, **kwargs)

    def _takes_any_number(self, asked: GenerationConfig, arguments: dict[str, Any]) -> bool:
        """Whether `_sample` takes more rows than there are slots, for these options and arguments of `generate()`."""
        return False

    def _check_prompts(
        self, input_ids: Tensor, embeds: Tensor | None, mask: Tensor | None, asked: GenerationConfig
    ) -> Tensor:
        """The mask of the prompts' columns, bool; raises ValueError for prompts that do not fit."""
        if embeds is None:
            mask = inferred_mask(input_ids, asked) if mask is None else mask
            return check_inputs(input_ids, mask, self.config.vocab_size, self.neuron_config)
        check_vocabulary(input_ids, torch.ones_like(input_ids, dtype=torch.bool), self.config.vocab_size)
        if mask is None and input_ids.shape[1] and input_ids.shape == embeds.shape[:2]:
            mask = inferred_mask(input_ids, asked)
        return check_embeddings(embeds, mask, self.config.word_embed_proj_dim, self.neuron_config)

    # transformers looks for `inputs_embeds` among the names.
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        for name in ("tokenizer", "assistant_tokenizer"):  # which transformers' beam search passes on to forward()
            kwargs.pop(name, None)
        inputs: dict[str, Any]
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        return inputs

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Greedy search and sampling; transformers calls it with the arguments that it prepared."""
        embeds: Tensor | None = model_kwargs.get("inputs_embeds")
        prompt = input_ids if embeds is None else torch.full(embeds.shape[:2], -1)
        mask = torch.ones_like(prompt) if attention_mask is None else attention_mask
        mask, rows = mask.bool(), len(input_ids)
        sampler = make_sampler(logits_processor, generation_config, self.neuron_config.max_topk)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        unfinished = torch.ones(rows, dtype=torch.bool)
        given: SlotCache | None = model_kwargs.get(CACHE)
        cache = SlotCache(self.engine, rows) if given is None else given
        # The last step of the prompt has the last token of every row (again, if it is in the cache): its logits are
        # wanted.
        end = int((mask * torch.arange(mask.shape[1])).amax(-1).min())
        cache.keep(cache.remasked(mask)[:, :end])
        chunk = generation_config.prefill_chunk_size
        self._encode_chunks(cache, prompt[:, :end], mask[:, :end], chunk, embeds)
        start = cache.get_seq_length()
        record = InnerRecord(generation_config, mask, start)

        def advance(result: StepResult) -> tuple[Tensor, SamplingInputs] | None:
            nonlocal input_ids, unfinished
            tokens = sampler.next_tokens(input_ids, result.tokens, result.logits)
            record.add(result)
            if ends:
                tokens = torch.where(unfinished, tokens, generation_config._pad_token_tensor)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(tokens)
            unfinished = unfinished & ~stopping_criteria(input_ids, sampler.scores)
            return (tokens, sampler.inputs(rows, input_ids.shape[1])) if unfinished.any() else None

        first = sampler.inputs(rows, input_ids.shape[1])
        rest = None if embeds is None else embeds[:, start:]
        needed = sampler.needs_logits
        self.engine.run(cache, prompt[:, start:], mask[:, start:], first, advance, rest, record.inner, needed)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,
            scores=sampler.scores,
            logits=sampler.raw_logits,
            **record.outputs,
            **{CACHE: cache if use_cache else None},
        )

    def _encode_chunks(
        self, cache: SlotCache, input_ids: Tensor, mask: Tensor, chunk: int | None, embeds: Tensor | None
    ) -> None:
        """Encodes columns that are not in the cache yet, `chunk` at a time; does nothing if `chunk` is None."""
        if chunk is None:
            return
        for start in range(cache.get_seq_length(), input_ids.shape[1], chunk):
            part = slice(start, start + chunk)
            if bool(mask[:, part].any()):
                given = None if embeds is None else embeds[:, : input_ids.shape[1]][:, part]
                self.engine.step(cache, input_ids[:, part], mask[:, part], 1, embeddings=given)
            else:
                cache.append(mask[:, part])

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        mask = kwargs["model_kwargs"].get("attention_mask")
        padding = 0 if mask is None else int((mask == 0).sum())  # of the one row that it has
        assistant, assistant_columns = kwargs.get("assistant_model"), None
        if isinstance(assistant, OPTGenerationMixin) and kwargs.get("assistant_tokenizer") is None:
            assistant_columns = assistant.neuron_config.sequence_length + padding
        return keep_in_room(generator, self.neuron_config.sequence_length + padding, assistant_columns)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        return _SharedCriteria(super()._get_stopping_criteria(*args, **kwargs), self.runtime.decide)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        prepared, others = super()._prepare_generation_config(generation_config, *args, **kwargs)
        if self.generation_config.max_new_tokens is None:
            mark_default_length(prepared, generation_config, kwargs)
        return prepared, others

    def _prepare_generated_length(self, generation_config: GenerationConfig, **kwargs: Any) -> GenerationConfig:
        """Where the caller gave no length, ends at `sequence_length`, as transformers does at its maximum."""
        by_default = length_is_default(generation_config, kwargs["has_default_max_length"])
        prepared = super()._prepare_generated_length(generation_config, **kwargs)
        # The columns of a prompt that are not among the ids, which lengths are counted by.
        beside = 0
        if kwargs["model_input_name"] == "inputs_embeds":
            beside = kwargs["inputs_tensor"].shape[1] - kwargs["input_ids_length"]
        setattr(prepared, _BESIDE_IDS, beside)
        if by_default:
            prepared.max_length = min(prepared.max_length, self.neuron_config.sequence_length - beside)
        return prepared

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Checks that what will be generated has room, and that the caller's cache, if it is one of ours, fits.

        Nothing is forgotten yet: options that transformers looks at later may still be refused.
        """
        restore_mask(generation_config, model_kwargs, batch_size)
        mask = model_kwargs["attention_mask"]
        width, longest, limit = mask.shape[1], int(mask.sum(-1).max()), self.neuron_config.sequence_length
        added = (generation_config.max_length or 0) + getattr(generation_config, _BESIDE_IDS) - width
        check_room(longest, added, limit)
        past = model_kwargs.pop(CACHE, None)
        # transformers 5 looks at the cache of assisted generation before the model is called.
        if past is not None or generation_mode == GenerationMode.ASSISTED_GENERATION:
            cache = own_cache(past, self.engine, len(mask))
            cache.remasked(mask)
            model_kwargs[CACHE] = cache


class _SharedCriteria(StoppingCriteriaList):
    """Where processes share the model, ends in all of them where it ends in the first, whatever their clocks say."""

    def __init__(self, criteria: StoppingCriteriaList, decide: Callable[[Tensor], Tensor]):
        super().__init__(criteria)
        self._decide = decide

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        return self._decide(super().__call__(input_ids, scores, **kwargs))
