"""`forward()`: new tokens in, logits and cache out, as transformers models do it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, OPTConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..configuration_opt import OPTNeuronConfig
from ..model.sampling import GREEDY, SamplingInputs
from ..targets import Inner, Runtime
from .cache import SlotCache, own_cache
from .engine import Engine
from .inner import inner_outputs
from .inputs import check_embeddings, check_inputs, check_labels, check_positions, joined, pack, unpack
from .refusals import NO_HEAD_MASK
from .transformers_versions import CACHE


class OPTForwardMixin:
    """`forward()` on a `Runtime`."""

    config: OPTConfig
    neuron_config: OPTNeuronConfig

    @property
    def runtime(self) -> Runtime:
        """The loaded weights, cache and graphs."""
        raise NotImplementedError

    @cached_property
    def engine(self) -> Engine:
        """Computes steps on the runtime."""
        return Engine(self.runtime, self.neuron_config.batch_size, self.neuron_config.sequence_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        seq_ids: Tensor | None = None,
        sampling_params: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...] | Tensor:
        """Logits of new tokens, and the cache that holds them.

        With `sampling_params`, the form that optimum-neuron's own callers use, see `forward_slots`.

        Args:
            input_ids: the new tokens, integers `(rows, width)`; None with `inputs_embeds`. Rows beyond the export's
                `batch_size` run in batches, one after the other, if neither `past_key_values` nor `use_cache=True` is
                passed.
            attention_mask: 1 for tokens that count, `(rows, past width + width)`; None for all.
            past_key_values: what an earlier call returned, for the columns before; None for none.
            labels: `(rows, width)`, ids or -100, as transformers': `loss` is the mean cross entropy of each column's
                label, given the columns before.
            use_cache: whether to return the cache; by default yes, where all rows fit the export's `batch_size`.
            position_ids: `(rows, width)`; only checked, since the mask determines positions.
            cache_position: `(width,)`; only checked.
            logits_to_keep: 0 for the logits of every column; n for those of each row's last n tokens.
            output_attentions, output_hidden_states: whether to return these, by default as config.json says.
            inputs_embeds: the new tokens as embeddings, floating point `(rows, width, word_embed_proj_dim)`, in place
                of ids: what `get_input_embeddings()` returns for ids.
            cache: transformers 5's name of `past_key_values`.
            return_dict: whether to return a ModelOutput, by default yes; otherwise a tuple.

        Returns:
            `logits`, float32 `(rows, width or logits_to_keep, vocabulary)`, 0 where masked; `past_key_values`, a
            `SlotCache` (the one that was passed, grown), None if `use_cache` is False or rows ran in batches, since
            later batches take the slots of earlier ones; `loss` with labels; and where asked for, as transformers' OPT
            returns them, but for 0 where masked:
            `hidden_states`, float32 `(rows, width, hidden)` before each layer and what the head gets, `(rows, width,
            word_embed_proj_dim)`; `attentions`, of each layer float32 `(rows, heads, width, past width + width)`.

        Raises:
            ValueError: for inputs that do not fit the export or each other; `past_key_values` is then as it was.
            NotImplementedError: for head masks; on `neuron` also for attentions and hidden states, and for embeddings
                if the export was not made for them.
        """
        inner = Inner(
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            self.config.output_attentions if output_attentions is None else output_attentions,
        )
        asked = {
            "head_mask": head_mask is not None,
            "inputs_embeds": inputs_embeds is not None,
            "output_hidden_states": inner.hidden_states,
            "output_attentions": inner.attentions,
        }
        for name, reason in {"head_mask": NO_HEAD_MASK, **self.runtime.unserved}.items():
            if asked[name]:
                raise NotImplementedError(f"{name} is not served: {reason}.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if sampling_params is not None:
            if input_ids is None:
                raise ValueError("sampling_params goes with input_ids, not with inputs_embeds.")
            return self.forward_slots(input_ids, position_ids, seq_ids, sampling_params)
        if seq_ids is not None:
            raise ValueError("seq_ids goes with sampling_params: pass both, or neither.")
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep}: 0 for every column, or how many of the last to keep.")
        if input_ids is None:
            assert inputs_embeds is not None
            input_ids = torch.full(inputs_embeds.shape[:2], -1)
        size, rows = self.neuron_config.batch_size, len(input_ids)
        past = past_key_values if cache is None else cache
        in_batches = rows > size and past is None
        if in_batches and use_cache:
            raise ValueError(
                f"{rows} rows do not fit the batch_size={size} that the model was exported for, and no more "
                f"are cached at once: pass at most {size} rows, or leave use_cache=True out to run all in batches."
            )
        with self.engine.lock:
            cache = own_cache(past, self.engine, rows)
            columns = cache.columns
            if inputs_embeds is None:
                mask = check_inputs(input_ids, attention_mask, self.config.vocab_size, self.neuron_config, columns)
            else:
                dim = self.config.word_embed_proj_dim
                mask = check_embeddings(inputs_embeds, attention_mask, dim, self.neuron_config, columns)
            if attention_mask is not None:
                columns = cache.remasked(attention_mask)
            check_positions(columns, mask, position_ids, cache_position)
            if labels is not None:
                check_labels(labels, mask)
            # After all checks, since bad inputs take no tokens from a cache; and before the device runs, since what is
            # forgotten may be overwritten when that is interrupted.
            cache.keep(columns)
            results = []
            for start in range(0, rows, size) if in_batches else (0,):
                part = slice(start, start + size if in_batches else None)
                owner = SlotCache(self.engine, len(mask[part])) if in_batches else cache
                given = None if inputs_embeds is None else inputs_embeds[part]
                results.append(
                    self.engine.step(owner, input_ids[part], mask[part], logits_to_keep, None, given, inner)
                )
        logits = unpack(joined([result.logits for result in results]), mask, logits_to_keep)
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, vocab_size=self.config.vocab_size)
        returned = None if use_cache is False or in_batches else cache
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, **inner_outputs(results, columns, mask), **{CACHE: returned}
        )
        return output.to_tuple() if return_dict is False else output

    def forward_slots(
        self, input_ids: Tensor, position_ids: Tensor | None, seq_ids: Tensor | None, sampling_params: Tensor
    ) -> Tensor:
        """Next tokens, int32 `(rows,)`, for callers who count slots themselves, as optimum-neuron's do.

        Args:
            input_ids: integers `(rows, n)`. Prompts are padded at the right.
            position_ids: `(rows, n)`, from 0 for prompts; behind a prompt's end 0, or anything that does not go on
                counting.
            seq_ids: the slot of each row, `(rows,)`; by default 0 to rows - 1.
            sampling_params: `(rows, 3)`: top_k, top_p, temperature; with top_k above 1, one number a row is drawn from
                torch's default generator.

        Raises:
            ValueError: for inputs that do not fit the export or each other.
        """
        rows, n = input_ids.shape
        seq_ids = torch.arange(rows) if seq_ids is None else seq_ids.flatten().long()
        size, limit = self.neuron_config.batch_size, self.neuron_config.sequence_length
        if len(seq_ids) != rows or len(set(seq_ids.tolist())) < rows or not all(0 <= i < size for i in seq_ids):
            raise ValueError(
                f"seq_ids={seq_ids.tolist()} must be {rows} different slots, one for each row, from 0 to {size - 1} "
                f"(the batch_size that the model was exported for is {size})."
            )
        if position_ids is None or position_ids.shape != input_ids.shape:
            raise ValueError(f"position_ids must have the shape of input_ids, {(rows, n)}.")
        if tuple(sampling_params.shape) != (rows, 3):
            raise ValueError(f"sampling_params has shape {tuple(sampling_params.shape)}, not {(rows, 3)}.")
        first = position_ids[:, :1]
        if bool((first < 0).any()) or int(position_ids.max()) >= limit:
            raise ValueError(f"position_ids go from 0 to {limit - 1} (sequence_length={limit}).")
        params = torch.cat([sampling_params.float(), torch.full((rows, 1), GREEDY[3])], dim=1)
        # The device looks at max_topk tokens; "all of them" is as many as it can.
        params[:, 0] = params[:, 0].clamp(1, self.neuron_config.max_topk)
        greedy = SamplingInputs.greedy(rows)
        drawn = bool((params[:, 0] > 1).any())
        if drawn:
            self.runtime.begin(input_ids)
        sampling = SamplingInputs(params, torch.rand(rows) if drawn else greedy.uniforms, greedy.suppressed)
        # The tokens of a row are those whose positions count up from the first.
        mask = (position_ids == first + torch.arange(n)).long().cumprod(-1).bool()
        check_inputs(input_ids, mask, self.config.vocab_size, self.neuron_config)
        step = pack(input_ids, mask, seq_ids.tolist(), first[:, 0].long(), 1, sampling)
        with self.engine.lock:
            self.engine.slots.free(seq_ids.tolist())
            return self.runtime.step(step).tokens
