"""More rows than the export has slots: they run in batches, one after the other, and return as one result."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import ModelOutput

from .inner import joined_steps
from .transformers_versions import CACHE


# Arguments of generate() with a row for each prompt.
_PER_PROMPT = ("attention_mask", "inputs_embeds", "negative_prompt_ids", "negative_prompt_attention_mask")


class Batches:
    """How one call of `generate()` is cut into batches.

    Beams of a prompt and the rows that guide it stay together. Sampled sequences of a prompt may be in different
    batches.

    Args:
        input_ids: prompts, `(prompts, width)`.
        asked: the options, prepared.
        arguments: the other arguments of `generate()`.
        batch_size: of the export.

    Raises:
        ValueError: if the rows of one prompt do not fit, or if what cannot be cut would have to be.
    """

    def __init__(self, input_ids: Tensor, asked: GenerationConfig, arguments: dict[str, Any], batch_size: int):
        self.input_ids, self.asked, self.arguments = input_ids, asked, arguments
        beams, sequences = asked.num_beams or 1, asked.num_return_sequences or 1
        guided = asked.guidance_scale not in (None, 1)
        assisted = arguments.get("assistant_model") is not None or asked.prompt_lookup_num_tokens is not None
        together = beams * (2 if guided else 1)
        if together > batch_size:
            what = [f"num_beams={beams}"] * (beams > 1) + [f"guidance_scale={asked.guidance_scale}"] * guided
            raise ValueError(
                f"{' and '.join(what)} make {together} rows of one prompt, which do not fit the "
                f"batch_size={batch_size} that the model was exported for: export with batch_size={together} or more."
            )
        # Sampled sequences of a prompt are rows like others.
        self.sequences = sequences if beams == 1 else 1
        units = len(input_ids) * self.sequences
        size = 1 if assisted else batch_size // together
        self.starts = range(0, units, size)
        if len(self.starts) < 2:
            return
        for name in ("streamer", CACHE):
            if arguments.get(name) is not None:
                raise ValueError(
                    f"{name} is for one batch, and {units * together} rows do not fit the batch_size={batch_size} "
                    "that the model was exported for: pass fewer prompts at once, or export with a larger batch_size."
                )

    def __len__(self) -> int:
        return len(self.starts)

    def run(self, generate: Callable[..., Any], generation_config: GenerationConfig | None) -> Tensor | ModelOutput:
        """Calls `generate` for each batch; one result, rows in the order of the prompts.

        Shorter results are padded; the scores of their missing steps are -inf. There are no `past_key_values`, since
        later batches take the slots of earlier ones.
        """
        began = time.monotonic()
        results = []
        rows = self.input_ids.repeat_interleave(self.sequences, dim=0)
        for start in self.starts:
            batch = slice(start, start + self.starts.step)
            arguments = dict(self.arguments)
            for name in _PER_PROMPT:
                if arguments.get(name) is not None:
                    arguments[name] = self._rows(arguments[name])[batch]
            if self.sequences > 1:
                arguments["num_return_sequences"] = 1
            if (allowed := arguments.get("prefix_allowed_tokens_fn")) is not None:
                arguments["prefix_allowed_tokens_fn"] = _shifted(allowed, start)
            if self.asked.max_time is not None:
                arguments["max_time"] = max(self.asked.max_time - (time.monotonic() - began), 0.0)
            if (criteria := arguments.get("stopping_criteria")) is not None:
                total, here = len(rows), len(rows[batch])
                arguments["stopping_criteria"] = StoppingCriteriaList(_OfAllRows(one, total, here) for one in criteria)
            results.append(generate(rows[batch], generation_config, **arguments))
        if isinstance(results[0], Tensor):
            return self._joined(results)
        return self._merged(results)

    def _rows(self, tensor: Tensor) -> Tensor:
        """One row for each sequence, of a tensor that has one for each prompt, or has them already."""
        return tensor.repeat_interleave(self.sequences, dim=0) if len(tensor) == len(self.input_ids) else tensor

    def _merged(self, results: Sequence[Any]) -> ModelOutput:
        merged: dict[str, Any] = {"sequences": self._joined([r.sequences for r in results])}
        for name in ("scores", "logits"):
            if results[0].get(name) is not None:
                merged[name] = _joined_steps([r[name] for r in results])
        for name in ("hidden_states", "attentions"):
            if results[0].get(name) is not None:
                merged[name] = joined_steps([r[name] for r in results])
        if results[0].get("sequences_scores") is not None:
            merged["sequences_scores"] = torch.cat([r.sequences_scores for r in results])
        if results[0].get("beam_indices") is not None:
            indices, offset = [], 0
            for start, result in zip(self.starts, results, strict=True):
                indices.append(torch.where(result.beam_indices < 0, -1, result.beam_indices + offset))
                prompts = min(self.starts.step, len(self.input_ids) - start)
                offset += prompts * self.asked.num_beams
            merged["beam_indices"] = _padded(indices, -1)
        return type(results[0])(**merged)

    def _joined(self, sequences: Sequence[Tensor]) -> Tensor:
        pad, ends = self.asked.pad_token_id, self.asked.eos_token_id
        end = ends[0] if isinstance(ends, (list, tuple)) else ends
        if (self.asked.num_beams or 1) > 1:
            # What transformers' beam search fills up with.
            return _padded(sequences, -1 if end is None else pad or end)
        return _padded(sequences, next((i for i in (pad, end) if i is not None), 0))


class _OfAllRows(StoppingCriteria):
    """A user's criterion in one of several batches.

    Some keep state for each row that they were made for, so each batch has a copy of its own, which is called with as
    many rows as the user passed: those of the batch, repeated.

    Args:
        criterion: the user's.
        total: how many rows the user passed.
        here: how many of them are in this batch.
    """

    def __init__(self, criterion: StoppingCriteria, total: int, here: int):
        try:
            self._criterion = copy.deepcopy(criterion)
        except TypeError:  # it holds what cannot be copied, and is used as it is
            self._criterion = criterion
        self._total, self._here = total, here

    def __getattr__(self, name: str) -> Any:  # transformers asks whether it has `eos_token_id`
        return getattr(self.__dict__["_criterion"], name)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = len(input_ids)
        repeated = torch.arange(rows // self._here * self._total) % rows
        done = self._criterion(input_ids[repeated], scores, **kwargs)
        return done[:rows] if isinstance(done, Tensor) and done.ndim else done


def _padded(parts: Sequence[Tensor], fill: int) -> Tensor:
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])


def _joined_steps(batches: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    steps = max(len(batch) for batch in batches)
    missing = [torch.full_like(batch[0], -torch.inf) for batch in batches]
    return tuple(
        torch.cat([batch[i] if i < len(batch) else nothing for batch, nothing in zip(batches, missing, strict=True)])
        for i in range(steps)
    )


def _shifted(allowed: Callable[[int, Tensor], list[int]], start: int) -> Callable[[int, Tensor], list[int]]:
    return lambda batch_id, sentence: allowed(batch_id + start, sentence)
