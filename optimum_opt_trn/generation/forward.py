"""One call of the model: new tokens in, logits and cache out, by whichever graph serves them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, OPTConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..buckets import smallest_bucket
from ..configuration_opt import OPTNeuronConfig
from ..model.sampling import GREEDY, Selection
from ..targets import Runtime
from .inputs import check_inputs, compact
from .slots import SlotCache, Slots


logger = logging.get_logger(__name__)

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's, and transformers'


class OPTForwardMixin:
    """`forward()` on a `Runtime`."""

    config: OPTConfig
    neuron_config: OPTNeuronConfig

    @property
    def runtime(self) -> Runtime:
        """The loaded graphs, weights and cache."""
        raise NotImplementedError

    @cached_property
    def slots(self) -> Slots:
        """The slots of the runtime's cache."""
        return Slots(self.runtime, self.neuron_config.batch_size, self.neuron_config.sequence_length)

    def forward(
        self,
        input_ids: Tensor,
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
    ) -> CausalLMOutputWithPast | tuple[Any, ...] | Tensor:
        """Logits of new tokens, and the cache that holds them.

        With `sampling_params`, the form that optimum-neuron's own callers use, see `forward_slots`.

        Args:
            input_ids: the new tokens, integers `(rows, width)`; rows as many as the export's `batch_size` or fewer.
            attention_mask: 1 for tokens that count, `(rows, past width + width)`; None for all.
            past_key_values: what an earlier call returned, for the columns before; None for none.
            labels: `(rows, width)`, ids or -100, as transformers': `loss` is the mean cross entropy of each column's
                label, given the columns before.
            use_cache: whether to return the cache; by default yes.
            position_ids: `(rows, width)`; may but confirm what follows from the mask.
            cache_position: `(width,)`; likewise.
            logits_to_keep: 0 for the logits of every column; n for those of each row's last n tokens.
            return_dict: whether to return a ModelOutput, by default yes; else a tuple.

        Returns:
            `logits`, float32 `(rows, width or logits_to_keep, vocabulary)`, 0 where masked; `past_key_values`, a
            `SlotCache` (the one that was passed, grown), unless `use_cache` is False; `loss` with labels.

        Raises:
            ValueError: for inputs that do not fit the export or each other; `past_key_values` is then as it was.
            NotImplementedError: for attentions, hidden states, head masks and embeddings as inputs.
        """
        unserved = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "inputs_embeds": inputs_embeds,
            "head_mask": head_mask,
        }
        for name, value in unserved.items():
            if value is not None and value is not False:
                raise NotImplementedError(f"{name}: compiled graphs take tokens and return logits, leave it out.")
        if sampling_params is not None:
            return self.forward_slots(input_ids, position_ids, seq_ids, sampling_params)
        if seq_ids is not None:
            raise ValueError("seq_ids goes with sampling_params: pass both, or neither.")
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep}: 0 for every column, or how many of the last to keep.")
        cache = self.adopt(past_key_values, len(input_ids))
        columns = torch.zeros(len(input_ids), 0, dtype=torch.bool) if cache is None else cache.columns
        mask = check_inputs(input_ids, attention_mask, self.config.vocab_size, self.neuron_config, columns)
        if cache is not None and attention_mask is not None:
            columns = cache.remasked(attention_mask)
        _check_positions(columns, mask, position_ids, cache_position)
        if labels is not None:
            _check_labels(labels, mask)
        # Checked before, so that bad inputs cost no one their slots, and no cache its tokens.
        if cache is None:
            cache = self.slots.lend(len(input_ids))
        # Before the device runs: if that is interrupted, what is forgotten may be overwritten already.
        cache.keep(columns)
        _, kept = self.feed(cache, input_ids, mask, logits_to_keep, Selection.greedy(len(input_ids)))
        logits = kept if logits_to_keep else _spread(kept, mask)
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, vocab_size=self.config.vocab_size)
        past = None if use_cache is False else cache
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
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
        greedy = Selection.greedy(rows)
        drawn = bool((params[:, 0] > 1).any())
        if drawn:
            self.runtime.begin(input_ids)
        selection = Selection(params, torch.rand(rows) if drawn else greedy.uniforms, greedy.suppressed)
        # The tokens of a row are those whose positions count up from the first.
        mask = (position_ids == first + torch.arange(n)).long().cumprod(-1).bool()
        check_inputs(input_ids, mask, self.config.vocab_size, self.neuron_config)
        self.slots.seize(seq_ids.tolist())
        return self._run(seq_ids, input_ids, mask, first[:, 0].to(torch.int32), 1, selection)[0]

    def feed(
        self, cache: SlotCache, input_ids: Tensor, mask: Tensor, keep: int, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """Writes new columns to the cache. Inputs are not checked, but for the cache.

        Args:
            cache: grows by the columns.
            input_ids, mask: integers and bool `(rows, width)`. A row without tokens is left as it is.
            keep: how many logits are wanted of each row, 0 for all of its tokens'.
            selection: how the next tokens are selected, `rows` of them.

        Returns:
            The next tokens, int32 `(rows,)`, and logits, float32 `(rows, keep, vocabulary)`, those of each row's last
            tokens last; 0 where a row has fewer.

        Raises:
            ValueError: if the cache has lost its slots.
        """
        self.slots.check(cache)
        self.slots.assign(cache)
        slots = torch.tensor(cache.rows)
        result = self._run(slots, input_ids, mask, cache.lengths, keep, selection)
        cache.append(mask)
        return result

    def _run(
        self, slots: Tensor, input_ids: Tensor, mask: Tensor, filled: Tensor, keep: int, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """`feed` for slots, int64 `(rows,)`, that hold int32 `filled` `(rows,)` tokens."""
        tokens, counts = compact(input_ids, mask)
        rows, longest = tokens.shape
        keep = keep or longest
        batch_size = self.neuron_config.batch_size
        whole = selection.scatter(slots, batch_size)
        if keep == 1 and not int(filled.max()):
            ids = torch.zeros(
                batch_size, smallest_bucket(self.neuron_config.prompt_buckets, longest), dtype=torch.int32
            )
            lengths = torch.zeros(batch_size, dtype=torch.int32)
            ids[slots, :longest], lengths[slots] = tokens, counts
            chosen, logits = self.runtime.prefill(ids, lengths, whole)
            return _pick(chosen, slots), _pick(logits, slots).unsqueeze(1)
        if longest == 1:
            step = _place(tokens[:, 0], slots, batch_size, 0)
            at = _place(torch.where(counts > 0, filled, -1), slots, batch_size, -1)
            chosen, logits = self.runtime.decode(step, at, whole)
            return _pick(chosen, slots), _at_the_end(_pick(logits, slots).unsqueeze(1), keep)
        # A row of fewer tokens repeats its last; one of none is idle.
        place = torch.arange(longest, dtype=torch.int32).minimum(counts[:, None] - 1)
        positions = torch.where(place < 0, place, filled[:, None] + place)
        tokens = tokens.gather(1, place.clamp(min=0).long())
        ids, at = _place(tokens, slots, batch_size, 0), _place(positions, slots, batch_size, -1)
        # Repetitions stand where the last of the wanted logits would.
        wanted = min(longest, keep + longest - int(counts.min()))
        chosen, logits = self.runtime.extend(ids, at, whole, wanted)
        source = counts[:, None] - keep + torch.arange(keep) - (longest - wanted)
        kept = logits[slots[:, None], source.clamp(min=0)]
        return chosen[slots], torch.where((source < 0)[:, :, None], 0.0, kept)

    def adopt(self, past: Cache | None, rows: int) -> SlotCache | None:
        """The caller's cache, as it is; None if it is to be a new one.

        Raises:
            ValueError: for another model's cache, one that has lost its slots, or another number of rows.
        """
        if past is None:
            return None
        if not isinstance(past, SlotCache):
            if not isinstance(past, Cache) or past.get_seq_length():
                raise ValueError(
                    f"past_key_values is a {type(past).__name__}, whose keys and values are not on the device: pass "
                    "what this model returned, or leave it out."
                )
            logger.warning_once(
                f"past_key_values is an empty {type(past).__name__}, which this model cannot fill: results are the "
                "same, but go on with the past_key_values that it returns to have only new tokens encoded."
            )
            return None
        self.slots.check(past)
        if len(past.columns) != rows:
            raise ValueError(f"past_key_values holds {len(past.columns)} rows, and input_ids has {rows}.")
        return past


def _place(x: Tensor, slots: Tensor, size: int, idle: int) -> Tensor:
    """Row i of x as row `slots[i]` of `size`, the others `idle`; x itself where it is all of them."""
    if slots.tolist() == [*range(size)]:
        return x
    placed = x.new_full((size, *x.shape[1:]), idle)
    placed[slots] = x
    return placed


def _pick(x: Tensor, slots: Tensor) -> Tensor:
    """`x[slots]`; x itself where that is all of it, for the logits of a step are not few."""
    return x if slots.tolist() == [*range(len(x))] else x[slots]


def _at_the_end(logits: Tensor, keep: int) -> Tensor:
    """`(rows, 1, vocabulary)` as the last of `keep`."""
    return torch.nn.functional.pad(logits, (0, 0, keep - 1, 0)) if keep > 1 else logits


def _spread(kept: Tensor, mask: Tensor) -> Tensor:
    """Logits of each row's tokens, the last at the end, `(rows, n, vocabulary)` → `(rows, width, vocabulary)`."""
    logits = torch.zeros(*mask.shape, kept.shape[2])
    for row, real in enumerate(mask):
        logits[row, real] = kept[row, kept.shape[1] - int(real.sum()) :]
    return logits


def _check_positions(
    columns: Tensor, mask: Tensor, position_ids: Tensor | None, cache_position: Tensor | None
) -> None:
    """Of new columns `mask` behind `columns`, both bool, `(rows, width)` and `(rows, past width)`."""
    start = columns.shape[1]
    if cache_position is not None and cache_position.tolist() != [*range(start, start + mask.shape[1])]:
        raise ValueError(
            f"cache_position={cache_position.tolist()} does not follow the {start} columns of past_key_values: "
            "leave it out."
        )
    if position_ids is not None:
        expected = columns.sum(-1, keepdim=True) + mask.cumsum(-1) - 1
        if bool((mask & (position_ids != expected)).any()):
            raise ValueError(
                "position_ids differ from those that follow from attention_mask, the only ones that an OPT knows: "
                "leave them out."
            )


def _check_labels(labels: Tensor, mask: Tensor) -> None:
    if labels.shape != mask.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but input_ids {tuple(mask.shape)}.")
    counted = labels[:, 1:] != IGNORED_LABEL
    if bool((counted & ~(mask[:, :-1] & mask[:, 1:])).any()):
        raise ValueError(
            f"labels count columns that attention_mask does not, or that follow one that it does not: make those "
            f"{IGNORED_LABEL}, or pad at the right, for there is nothing to predict them from."
        )
