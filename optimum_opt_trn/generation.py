"""The adapter to transformers' GenerationMixin, and the loop that drives the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .configuration_opt import OPTNeuronConfig
from .graphs import smallest_bucket
from .sampling import MAX_SUPPRESSED, Selection
from .targets import Runtime


# Attributes of a GenerationConfig that are not served yet when they are set: each raises by its name.
_REFUSED_OPTIONS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "prefill_chunk_size",
)


class TokenSelector:
    """What the device is told at each step of one call, from the logits processors that transformers made for it.

    Args:
        processors: all that was asked for is in them, since transformers made them from the generation config.
        do_sample: else the best token is taken.
        max_topk: the most that the export can choose among.

    Raises:
        NotImplementedError: for a processor that the device path does not serve, by its name.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, max_topk: int):
        top_k, top_p, temperature = (0.0, 1.0, 1.0) if do_sample else (1.0, 1.0, 1.0)
        self.do_sample = do_sample
        self._suppressed: list[tuple[int, list[int]]] = []
        for processor in processors:
            # Exact types: a subclass may do anything.
            kind = type(processor)
            if kind is MinLengthLogitsProcessor:
                self._suppress(processor.min_length, processor.eos_token_id)
            elif kind is MinNewTokensLengthLogitsProcessor:
                least = processor.prompt_length_to_skip + processor.min_new_tokens
                self._suppress(least, processor.eos_token_id)
            elif kind is TemperatureLogitsWarper:
                temperature = processor.temperature
            elif kind is TopKLogitsWarper:
                top_k = processor.top_k
            elif kind is TopPLogitsWarper:
                top_p = processor.top_p
            else:
                raise NotImplementedError(
                    f"{kind.__name__} was asked for (by an option of generate() or in logits_processor), and this "
                    "version of optimum_opt_trn does not serve it: see the list of what it serves in README.md."
                )
        if do_sample and not 1 <= top_k <= max_topk:
            raise NotImplementedError(
                f"top_k={int(top_k)} cannot be sampled on the device, which chooses among the best {max_topk} tokens "
                f"(max_topk of the export): choose top_k between 1 and {max_topk}, or export with a larger max_topk."
            )
        self._params = (top_k, top_p, temperature)

    def _suppress(self, least: int, eos_token_id: Tensor) -> None:
        ids = eos_token_id.flatten().tolist()
        if len(ids) > MAX_SUPPRESSED:
            raise NotImplementedError(
                f"min_length with {len(ids)} end-of-sequence ids: the device excludes at most {MAX_SUPPRESSED}."
            )
        self._suppressed.append((least, ids))

    def step(self, length: int, rows: int, batch_size: int) -> Selection:
        """The selection that follows sequences of `length` tokens (padding included, as transformers counts).

        One uniform number a row is drawn, finished rows included; the device's idle rows get 0.
        """
        ids = {i for least, ids in self._suppressed if length < least for i in ids}
        suppressed = torch.full((batch_size, MAX_SUPPRESSED), -1, dtype=torch.int32)
        suppressed[:, : len(ids)] = torch.tensor(sorted(ids), dtype=torch.int32)
        uniforms = torch.zeros(batch_size)
        if self.do_sample:
            uniforms[:rows] = torch.rand(rows)
        return Selection(torch.tensor([self._params]).repeat(batch_size, 1), uniforms, suppressed)


class OPTGenerationMixin(GenerationMixin):
    """`generate()` on a `Runtime`: greedy and sampled, ragged batches, each row as if it were alone."""

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_cache_class = False

    neuron_config: OPTNeuronConfig

    @property
    def runtime(self) -> Runtime:
        """The loaded graphs, weights and cache."""
        raise NotImplementedError

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' `generate()`; see there. Prompts are checked before anything else happens.

        Raises:
            ValueError: for a prompt that is empty, too long, or holds ids outside of the vocabulary, and for more rows
                or tokens than the export was made for.
            NotImplementedError: for an option that this version does not serve, by its name.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is not None:
            mask = kwargs.get("attention_mask")
            self.compact(input_ids, self._inferred_mask(input_ids, kwargs) if mask is None else mask)
        return super().generate(inputs, *args, **kwargs)

    def _inferred_mask(self, input_ids: Tensor, options: dict[str, Any]) -> Tensor | None:
        """The mask that transformers will assume where none is given: padding does not count, unless it also ends."""
        configs = (options.get("generation_config"), self.generation_config)
        pad, ends = (
            options.get(name, next((v for c in configs if (v := getattr(c, name, None)) is not None), None))
            for name in ("pad_token_id", "eos_token_id")
        )
        if pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
            return None
        return input_ids != pad

    def compact(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Drops masked tokens: OPT counts positions over the mask, so that no result depends on them.

        Args:
            input_ids: integers `(rows, width)`.
            attention_mask: 1 (or True) for tokens that count, `(rows, width)`; None for all.

        Returns:
            int32 tokens `(batch_size, n)`, n a prompt bucket, each row's first; int32 lengths `(batch_size,)`. Rows
            that the batch has beyond `rows` are idle: one token, 0.

        Raises:
            ValueError: see `generate`.
        """
        config = self.neuron_config
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be whole numbers of shape (rows, tokens), not {input_ids.dtype} "
                f"{tuple(input_ids.shape)}."
            )
        rows = input_ids.shape[0]
        if rows > config.batch_size:
            raise ValueError(
                f"{rows} rows do not fit the batch_size={config.batch_size} that the model was exported for: pass at "
                f"most {config.batch_size}, or export with batch_size={rows}."
            )
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but input_ids has {tuple(input_ids.shape)}."
            )
        lengths = mask.sum(-1)
        if rows == 0 or int(lengths.min()) == 0:
            row = 0 if rows == 0 else int(lengths.argmin())
            raise ValueError(f"The prompt of row {row} is empty: a prompt has at least one token, for example </s>.")
        longest = int(lengths.max())
        if longest >= config.sequence_length:
            raise ValueError(
                f"A prompt of {longest} tokens leaves no room in the sequence_length={config.sequence_length} that "
                f"the model was exported for: shorten it to {config.sequence_length - 1} or fewer, or export with a "
                "larger sequence_length."
            )
        outside = mask & ((input_ids < 0) | (input_ids >= self.config.vocab_size))
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"Token id {int(input_ids[row, column])} (row {row}, place {column}) is outside of the vocabulary: "
                f"ids go from 0 to {self.config.vocab_size - 1}. Is it the model's own tokenizer?"
            )
        # A stable sort by "masked" brings the tokens that count to the front, in their order.
        order = torch.argsort(~mask, dim=-1, stable=True)[:, :longest]
        tokens = torch.zeros(config.batch_size, smallest_bucket(config.prompt_buckets, longest), dtype=torch.int32)
        tokens[:rows, :longest] = torch.where(mask, input_ids, 0).gather(1, order).to(torch.int32)
        padded = torch.ones(config.batch_size, dtype=torch.int32)
        padded[:rows] = lengths.to(torch.int32)
        return tokens, padded

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The on-device loop, which transformers calls for greedy search and sampling."""
        self._refuse_unserved(generation_config, {**model_kwargs, "synced_gpus": synced_gpus})
        tokens, lengths = self.compact(input_ids, attention_mask)
        self._check_room(input_ids.shape[1], int(lengths.max()), generation_config.max_length)
        config, rows = self.neuron_config, input_ids.shape[0]
        selector = TokenSelector(logits_processor, generation_config.do_sample, config.max_topk)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        unfinished = torch.ones(rows, dtype=torch.bool)
        positions = lengths.clone()

        chosen, _ = self.runtime.prefill(tokens, lengths, selector.step(input_ids.shape[1], rows, config.batch_size))
        while True:
            new = chosen[:rows].long()
            if ends:
                new = torch.where(unfinished, new, generation_config._pad_token_tensor)
            input_ids = torch.cat([input_ids, new[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(new)
            unfinished &= ~stopping_criteria(input_ids, None)
            if not unfinished.any():
                break
            step = torch.zeros(config.batch_size, dtype=torch.int32)
            step[:rows] = new.to(torch.int32)
            chosen, _ = self.runtime.decode(
                step, positions, selector.step(input_ids.shape[1], rows, config.batch_size)
            )
            positions[:rows] += 1
        if streamer is not None:
            streamer.end()
        return input_ids

    def _refuse_unserved(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
        asked = [name for name in _REFUSED_OPTIONS if getattr(generation_config, name, None)]
        # The tokenizer is for the stopping criteria, which transformers has made already.
        consumed = ("use_cache", "tokenizer")
        asked += [k for k, v in model_kwargs.items() if v is not None and v is not False and k not in consumed]
        asked += [] if generation_config.use_cache else ["use_cache=False"]
        if asked:
            raise NotImplementedError(
                f"generate() was asked for {', '.join(asked)}, which this version of optimum_opt_trn does not serve."
            )

    def _check_room(self, width: int, longest: int, max_length: int) -> None:
        """Raises ValueError if `longest`, of prompts padded to `width`, cannot grow to `max_length`."""
        limit = self.neuron_config.sequence_length
        if longest + max_length - width > limit:
            raise ValueError(
                f"A prompt of {longest} tokens and {max_length - width} new ones do not fit the "
                f"sequence_length={limit} that the model was exported for: choose max_new_tokens of at most "
                f"{limit - longest}, or export with a larger sequence_length."
            )

    def _prepare_generated_length(self, generation_config: GenerationConfig, **kwargs: Any) -> GenerationConfig:
        """Where the caller gave no length, ends at `sequence_length`, as transformers does at its maximum."""
        by_default = (
            kwargs["has_default_max_length"]
            and generation_config.max_new_tokens is None
            and generation_config.max_length == GenerationConfig().max_length
        )
        prepared = super()._prepare_generated_length(generation_config, **kwargs)
        if by_default:
            prepared.max_length = min(prepared.max_length, self.neuron_config.sequence_length)
        return prepared

    def _supports_default_dynamic_cache(self) -> bool:
        return False  # the cache is on the device

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("Beam search (num_beams > 1) is not served by this version of optimum_opt_trn.")

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "Assisted generation (assistant_model, prompt_lookup_num_tokens) is not served by this version of "
            "optimum_opt_trn."
        )
