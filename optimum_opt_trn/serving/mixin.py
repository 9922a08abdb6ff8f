"""A model's methods for requests: `generate_batch`, `init_continuous_batching`, `generate()` of any number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from ..generation.generate import OPTGenerationMixin
from ..generation.samplers import make_sampler
from ..generation.transformers_versions import processors_of_row
from .batcher import Batcher
from .manager import ContinuousBatchingManager
from .options import OWN_CRITERIA, RequestMaker, own_generator
from .prefixes import Prefixes
from .request import Request
from .results import BatchResults, output_of


# Options and arguments of generate() that let rows see each other, or want more of a row than its tokens: such calls
# run in batches. Processors and criteria of the caller may keep state for the rows of a batch.
_IN_BATCHES = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "watermarking_config")
_ARGUMENTS_IN_BATCHES = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "custom_generate",
    "inputs_embeds",
)


class ContinuousBatchingMixin(OPTGenerationMixin):
    """Continuous batching on the model's engine."""

    @cached_property
    def prefixes(self) -> Prefixes:
        """What the slots hold of requests that have ended."""
        return Prefixes(self.engine.slots)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        max_queue_size: int = 0,
        streaming: bool = False,
    ) -> ContinuousBatchingManager:
        """A manager, not started yet, that answers requests of any thread.

        Args:
            generation_config: options of every request; by default the model's.
            max_queue_size: how many requests may wait for a slot; 0 for any number.
            streaming: whether there is a result after every token of a request, not only at its end.

        Raises:
            NotImplementedError: where processes share the model, since requests reach each of them at other times.
            ValueError: for options that mean nothing.
        """
        if self.runtime.is_shared:
            raise NotImplementedError(
                "init_continuous_batching() is for a model in one process, since requests would reach processes that "
                "share it at different times: call generate_batch(), or load the model without tp_processes."
            )
        return ContinuousBatchingManager(self, generation_config, self.prefixes, max_queue_size, streaming)

    def generate_batch(
        self,
        inputs: Iterable[Any],
        generation_config: GenerationConfig | None = None,
        progress_bar: bool = True,
        **options: Any,
    ) -> BatchResults:
        """Continues any number of prompts, each in a slot of its own as soon as one is free.

        A prompt that does not fit, or an error in its processors, ends that request: its status is FAILED, and its
        `error` has the message. An interrupt ends all.

        Args:
            inputs: prompts, each a list of tokens; a generator is read as slots get free.
            generation_config: options of every request; by default the model's.
            progress_bar: whether to show one.
            options: of every request, as of `ContinuousBatchingManager.add_request`.

        Returns:
            transformers' `GenerationOutput` of each request, by its id: `req_0` and so on, in the order of the
            prompts. `n` sequences of a prompt are `req_0__child#0`, …, `req_0`. `statistics` of it tells how it went.

        Raises:
            TypeError: for an unknown option, naming the nearest; for text as a prompt.
            ValueError: for values that mean nothing.
            NotImplementedError: for what requests do not do, such as beams.
        """
        maker, results = RequestMaker(self, generation_config), BatchResults()
        batcher = Batcher(self.engine, self.prefixes, maker.chunk)
        total = len(inputs) if isinstance(inputs, Sized) else None
        with (
            self.engine.generating(assists_itself=False),
            tqdm(total=total, disable=not progress_bar, desc="Solving requests", unit="request") as progress,
        ):
            self.runtime.begin()

            def finished(request: Request) -> None:
                if request.is_over:
                    results[request.request_id] = output_of(request)
                    progress.update(not request.request_id.rpartition("__child#")[1])

            prompts, names = enumerate(inputs), list[str]()
            with batcher.aborting():
                while True:
                    # Enough of them that the queue never runs dry within a step.
                    while len(batcher.scheduler) < 2 * self.engine.slots.batch_size:
                        if (following := next(prompts, None)) is None:
                            break
                        for request in maker.make(f"req_{following[0]}", following[1], options):
                            names.append(request.request_id)
                            request.listener = finished
                            batcher.add(request)
                    if not batcher.step() and len(results) == len(names):
                        break
        # Neither those that ended first, nor those that were reached first.
        ordered = BatchResults({name: results[name] for name in names})
        ordered.statistics = batcher.statistics()
        return ordered

    def _takes_any_number(self, asked: GenerationConfig, arguments: dict[str, Any]) -> bool:
        plain = RequestMaker.serves(asked) and arguments.get("assistant_model") is None
        outputs = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
        details = asked.return_dict_in_generate and any(getattr(asked, name) for name in outputs)
        together = any(getattr(asked, name, None) not in (None, 0, 1, 1.0) for name in _IN_BATCHES)
        given = any(arguments.get(name) is not None for name in _ARGUMENTS_IN_BATCHES)
        # Rows that a stop string has ended, with no token for an end, go on until the last one of their batch.
        goes_on = asked.stop_strings is not None and asked.eos_token_id is None
        return plain and not (details or together or given or goes_on)

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
        """See `OPTGenerationMixin`; more rows than there are slots take turns, each row as soon as a slot is free."""
        if len(input_ids) <= self.neuron_config.batch_size:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                attention_mask,
                use_cache,
                **model_kwargs,
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ends = generation_config._eos_token_tensor
        max_times = [one.max_time for one in stopping_criteria if isinstance(one, MaxTimeCriteria)]
        batcher = Batcher(self.engine, self.prefixes, generation_config.prefill_chunk_size)
        requests = []
        for row, (shown, counted) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            own = processors_of_row(logits_processor, row)
            sampler = make_sampler(own, generation_config, self.neuron_config.max_topk)
            if generation_config.do_sample:
                sampler.generator = own_generator()
            requests.append(
                Request(
                    request_id=str(row),
                    prompt=shown[counted].tolist(),
                    sampler=sampler,
                    most=generation_config.max_length - len(shown),
                    ends=frozenset(() if ends is None else ends.tolist()),
                    criteria=[one for one in stopping_criteria if not isinstance(one, OWN_CRITERIA)],
                    shown=shown.tolist(),
                    max_time=min(max_times, default=None),
                    starts_late=True,
                )
            )
            batcher.add(requests[-1])
        with batcher.aborting():
            while batcher.step():
                if batcher.failure is not None:
                    raise batcher.failure
        longest = max(len(request.generated) for request in requests)
        pad = generation_config._pad_token_tensor
        fill = 0 if pad is None else int(pad)
        new = torch.tensor([one.generated + [fill] * (longest - len(one.generated)) for one in requests])
        sequences = torch.cat([input_ids, new], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences)
