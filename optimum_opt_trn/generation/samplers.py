"""Where the next tokens of a `generate()` call are sampled: on the device, or on the host from the logits.

Both draw in the same way: one uniform number for each row and step, from torch's default generator, inverts the
cumulative distribution of the tokens in the order of their probability. So a seed gives the same tokens on either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    LogitNormalization,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from ..model.sampling import GREEDY, MAX_SUPPRESSED, SamplingInputs, sample_tokens


logger = logging.get_logger(__name__)

# What the device can do, in its order. Other processors, or these in another order, run on the host.
_DEVICE_ORDER: tuple[type[LogitsProcessor], ...] = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    LogitNormalization,
)


class Sampler(ABC):
    """Samples the next tokens of one call of `generate()`, step by step."""

    # Where random numbers come from; None for torch's default generator.
    generator: torch.Generator | None = None
    # None, or the processed and the raw logits of each step so far, float32 `(rows, vocabulary)`.
    scores: tuple[Tensor, ...] | None = None
    raw_logits: tuple[Tensor, ...] | None = None

    def __init__(self, generation_config: GenerationConfig):
        if generation_config.return_dict_in_generate:
            self.scores = () if generation_config.output_scores else None
            self.raw_logits = () if generation_config.output_logits else None

    @property
    def needs_logits(self) -> bool:
        """Whether `next_tokens` reads the logits."""
        return self.scores is not None or self.raw_logits is not None

    def _keep(self, scores: Tensor, logits: Tensor) -> None:
        """Adds those of a step, float32 `(rows, vocabulary)`, as far as they are kept."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.raw_logits is not None:
            self.raw_logits += (logits,)

    @abstractmethod
    def inputs(self, rows: int, width: int) -> SamplingInputs:
        """What the device gets, for `rows` sequences of `width` columns (padding counts, as in transformers)."""

    @abstractmethod
    def next_tokens(self, input_ids: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        """The next tokens, int64 `(rows,)`.

        Args:
            input_ids: int64 `(rows, width)`.
            tokens: int32 `(rows,)`, what the device sampled.
            logits: float32 `(rows, vocabulary)`, if `needs_logits`.
        """


class DeviceSampler(Sampler):
    """Takes what the device sampled.

    Args:
        processors: those that `device_refusal` does not refuse.
        generation_config: for `do_sample`, and whether to keep `scores` and `raw_logits`.
    """

    def __init__(self, processors: LogitsProcessorList, generation_config: GenerationConfig):
        super().__init__(generation_config)
        self.do_sample = generation_config.do_sample
        self._suppressed: list[tuple[int, list[int]]] = []
        top_k, top_p, temperature, min_p = GREEDY
        for processor in processors:
            kind = type(processor)
            if kind is MinLengthLogitsProcessor:
                self._suppressed.append((processor.min_length, processor.eos_token_id.flatten().tolist()))
            elif kind is MinNewTokensLengthLogitsProcessor:
                least = processor.prompt_length_to_skip + processor.min_new_tokens
                self._suppressed.append((least, processor.eos_token_id.flatten().tolist()))
            elif kind is TemperatureLogitsWarper:
                temperature = processor.temperature
            elif kind is TopKLogitsWarper:
                top_k = processor.top_k
            elif kind is TopPLogitsWarper:
                top_p = processor.top_p
            elif kind is MinPLogitsWarper:
                min_p = processor.min_p
        self._params = torch.tensor([(top_k, top_p, temperature, min_p) if self.do_sample else GREEDY])

    @property
    def always_best(self) -> bool:
        """Whether the best token is taken at any width."""
        return not self.do_sample and not self._suppressed

    def inputs(self, rows: int, width: int) -> SamplingInputs:
        ids = sorted({i for least, ids in self._suppressed if width < least for i in ids})
        suppressed = torch.full((rows, MAX_SUPPRESSED), -1, dtype=torch.int32)
        if ids:
            suppressed[:, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        uniforms = torch.rand(rows, generator=self.generator) if self.do_sample else torch.zeros(rows)
        return SamplingInputs(self._params.repeat(rows, 1), uniforms, suppressed)

    def next_tokens(self, input_ids: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        self._keep(logits, logits)
        return tokens.long()


class HostSampler(Sampler):
    """Samples from the logits on the host, after transformers' own processors.

    Args:
        processors: any processors.
        generation_config: for `do_sample`, and whether to keep `scores` and `raw_logits`.
    """

    def __init__(self, processors: LogitsProcessorList, generation_config: GenerationConfig):
        super().__init__(generation_config)
        self._processors = processors
        self._do_sample = generation_config.do_sample

    @property
    def needs_logits(self) -> bool:
        return True

    def inputs(self, rows: int, width: int) -> SamplingInputs:
        return SamplingInputs.greedy(rows)

    def next_tokens(self, input_ids: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        scores = self._processors(input_ids, logits.clone())
        self._keep(scores, logits)
        if not self._do_sample:
            return scores.argmax(dim=-1)
        if bool((scores.amax(dim=-1) == -torch.inf).any() | scores.isnan().any()):
            raise ValueError("The logits processors leave a row nothing to sample: all its scores are -inf, or NaN.")
        rows, size = scores.shape
        params = torch.tensor([[size, *GREEDY[1:]]]).repeat(rows, 1)
        nothing = SamplingInputs.greedy(rows).suppressed
        uniforms = torch.rand(rows, generator=self.generator)
        return sample_tokens(scores, params, uniforms, nothing, size).long()


def make_sampler(
    processors: LogitsProcessorList, generation_config: GenerationConfig, max_topk: int
) -> DeviceSampler | HostSampler:
    """The device's sampler if the device can do all that was asked for, otherwise the host's. Logs which, and why.

    Args:
        processors: those that transformers made from the generation config, and the caller's own.
        generation_config: as prepared by transformers.
        max_topk: of the export.
    """
    reason = device_refusal(processors, generation_config, max_topk)
    if reason:
        logger.debug(f"Tokens are sampled on the host: {reason}.")
        return HostSampler(processors, generation_config)
    logger.debug("Tokens are sampled on the device.")
    return DeviceSampler(processors, generation_config)


def device_refusal(processors: LogitsProcessorList, generation_config: GenerationConfig, max_topk: int) -> str | None:
    """Why the device cannot sample the tokens; None if it can. Arguments as of `make_sampler`."""
    if generation_config.return_dict_in_generate and generation_config.output_scores and processors:
        return f"output_scores was asked for, and {type(processors[0]).__name__} changes scores"
    stage, top_k = -1, None
    ends: set[int] = set()
    for processor in processors:
        # Exact types: a subclass may do anything.
        name, kind = type(processor).__name__, type(processor)
        if kind not in _DEVICE_ORDER:
            return f"{name} is not done on the device"
        if (at := _DEVICE_ORDER.index(kind)) <= stage:
            return f"{name} comes after {_DEVICE_ORDER[stage].__name__}"
        stage = at
        if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
            return f"{name} has a filter_value"
        if getattr(processor, "min_tokens_to_keep", 1) > 1:
            return f"{name} keeps several tokens (min_tokens_to_keep)"
        if kind in _DEVICE_ORDER[:2]:
            ends.update(processor.eos_token_id.flatten().tolist())
        if kind is TopKLogitsWarper:
            top_k = processor.top_k
    if len(ends) > MAX_SUPPRESSED:
        return f"{len(ends)} end-of-sequence ids are excluded, and the device can do {MAX_SUPPRESSED}"
    if generation_config.do_sample and (top_k is None or top_k > max_topk):
        return f"top_k={top_k or 0} is not within the {max_topk} that the export's max_topk allows"
    return None
