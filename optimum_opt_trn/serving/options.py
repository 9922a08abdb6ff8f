"""A request's options: those of `generate()` that concern one row, and some that only requests have."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from ..configuration_opt import reject_unknown
from ..generation.arguments import as_tensor, check_options
from ..generation.generate import OPTGenerationMixin
from ..generation.inputs import check_inputs, check_room
from ..generation.refusals import refuse_options
from ..generation.samplers import make_sampler
from ..generation.transformers_versions import lengths_by_default, prepare_options
from .request import Request


# What a request takes besides the options of GenerationConfig.
OF_REQUESTS = (
    "seed",
    "priority",
    "logprobs",
    "n",
    "logits_processor",
    "stopping_criteria",
    "tokenizer",
    "record_timestamps",
)
# Options whose results a request has no place for, or that concern several rows.
_NOT_SERVED = {
    "output_scores": "ask for logprobs=True, or call generate()",
    "output_logits": "ask for logprobs=True, or call generate()",
    "output_hidden_states": "call generate()",
    "output_attentions": "call generate()",
    "token_healing": "call generate()",
    "prefill_chunk_size": "it is an option of all requests together: put it into the generation_config",
}
# What requests look after themselves.
OWN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)


class RequestMaker:
    """Makes the requests of a model.

    Args:
        model: whose options count where a request has none of its own.
        generation_config: options of every request; None for the model's.
    """

    def __init__(self, model: OPTGenerationMixin, generation_config: GenerationConfig | None):
        self.model, self.given = model, copy.deepcopy(generation_config)
        # The latest options, and what they came to: most requests have the same.
        self._latest: tuple[dict[str, Any], GenerationConfig] | None = None

    @property
    def chunk(self) -> int | None:
        """Tokens of prompts in a step, if every request's options say so."""
        chunk: int | None = self.settle({}).prefill_chunk_size
        return chunk

    def make(self, request_id: str, input_ids: Any, options: dict[str, Any]) -> list[Request]:
        """The requests for one prompt, one for each sequence that was asked for.

        A prompt that does not fit makes requests that have failed already, with the reason.

        Args:
            request_id: of the last of them; the others are called `{request_id}__child#{i}`.
            input_ids: the prompt's tokens, a list or a tensor `(n,)` or `(1, n)`.
            options: those of GenerationConfig, and `OF_REQUESTS`.

        Raises:
            TypeError: for an unknown option, naming the nearest, and for text as a prompt.
            ValueError: for values that mean nothing; NotImplementedError for what requests do not do.
        """
        own = {name: value for name, value in options.items() if name in OF_REQUESTS}
        rest = {name: value for name, value in options.items() if name not in own}
        if own.get("n") is not None:
            rest.setdefault("num_return_sequences", own["n"])
        if rest.get("max_length") is not None:  # and not the max_new_tokens of all requests
            rest.setdefault("max_new_tokens", None)
        _check(own)
        asked = self.settle(rest)
        tensor = as_tensor(input_ids, "input_ids")
        tensor = tensor.long() if tensor.numel() == 0 else tensor
        prompt = tensor.reshape(-1).tolist() if tensor.shape[:-1] in ((), (1,)) else None
        if prompt is None:
            raise ValueError(f"input_ids has shape {tuple(tensor.shape)}: a request has one prompt, (n,) or (1, n).")
        count = asked.num_return_sequences or 1
        names = [*(f"{request_id}__child#{i}" for i in range(count - 1)), request_id]
        try:
            check_inputs(tensor.reshape(1, -1), None, self.model.config.vocab_size, self.model.neuron_config)
            asked = self._with_length(asked, len(prompt), rest)
        except ValueError as error:
            nothing = make_sampler(LogitsProcessorList(), asked, self.model.neuron_config.max_topk)
            failed = [Request(name, prompt, nothing, 1) for name in names]
            for request in failed:
                request.status, request.error = RequestStatus.FAILED, str(error)
            return failed
        return [self._request(name, prompt, asked, own, i) for i, name in enumerate(names)]

    @staticmethod
    def serves(asked: GenerationConfig) -> bool:
        """Whether a row is continued without other rows."""
        plain = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        return asked.get_generation_mode() in plain and asked.guidance_scale in (None, 1)

    def settle(self, options: dict[str, Any]) -> GenerationConfig:
        """The options with their defaults. For errors see `make`."""
        simple = all(value is None or isinstance(value, (bool, int, float, str)) for value in options.values())
        if simple and self._latest is not None and self._latest[0] == options:
            return self._latest[1]
        config = copy.deepcopy(self.given)
        known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
        reject_unknown(options, known.union(OF_REQUESTS), "a request")
        if config is not None:
            config.update(**options)
        asked, _ = prepare_options(self.model, config, {} if config is not None else dict(options))
        check_options(asked, (), ())
        refuse_options(asked)
        for name, way_out in _NOT_SERVED.items():
            if options.get(name):
                raise NotImplementedError(f"A request was given {name}={options[name]!r}: {way_out}.")
        if not self.serves(asked):
            mode = str(asked.get_generation_mode().value).replace("_", " ")
            what = mode if asked.guidance_scale in (None, 1) else f"guidance (guidance_scale={asked.guidance_scale})"
            raise NotImplementedError(f"Requests do greedy search and sampling, not {what}: call generate().")
        if asked.pad_token_id is None:  # which transformers would say of each request
            asked.pad_token_id = asked.eos_token_id[0] if isinstance(asked.eos_token_id, list) else asked.eos_token_id
        self.model._prepare_special_tokens(asked, True, device="cpu")
        asked.return_dict_in_generate = False
        if simple:
            self._latest = options, asked
        return asked

    def _with_length(self, asked: GenerationConfig, length: int, options: dict[str, Any]) -> GenerationConfig:
        """`asked` for a prompt of so many tokens; ValueError if there is no room."""
        default_most, default_least = lengths_by_default(self.model, self.given, options, asked)
        prepared = self.model._prepare_generated_length(
            generation_config=copy.copy(asked),
            has_default_max_length=default_most,
            has_default_min_length=default_least,
            model_input_name="input_ids",
            input_ids_length=length,
            inputs_tensor=None,
        )
        added = (prepared.max_length or 0) - length
        check_room(length, added, self.model.neuron_config.sequence_length)
        if added < 1:
            raise ValueError(
                f"A prompt of {length} tokens leaves nothing of max_length={prepared.max_length}, which counts the "
                "prompt: choose max_new_tokens instead."
            )
        return prepared

    def _request(
        self, name: str, prompt: list[int], asked: GenerationConfig, own: dict[str, Any], number: int
    ) -> Request:
        processors = self.model._get_logits_processor(
            asked,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=torch.tensor([prompt]),
            logits_processor=LogitsProcessorList(own.get("logits_processor") or ()),
            device="cpu",
            model_kwargs={},
        )
        sampler = make_sampler(processors, asked, self.model.neuron_config.max_topk)
        if asked.do_sample:
            seed = own.get("seed")
            sampler.generator = own_generator(None if seed is None else seed + number)
        criteria = self.model._get_stopping_criteria(
            asked, StoppingCriteriaList(own.get("stopping_criteria") or ()), tokenizer=own.get("tokenizer")
        )
        ends = asked._eos_token_tensor
        return Request(
            request_id=name,
            prompt=prompt,
            sampler=sampler,
            most=asked.max_length - len(prompt),
            ends=frozenset(() if ends is None else ends.tolist()),
            criteria=[one for one in criteria if not isinstance(one, OWN_CRITERIA)],
            wants_logprobs=bool(own.get("logprobs")),
            priority=own.get("priority") or 0,
            max_time=asked.max_time,
            timestamps=[] if own.get("record_timestamps") else None,
        )


def own_generator(seed: int | None = None) -> torch.Generator:
    """Random numbers of one row; without a seed, from one of torch's default generator."""
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    return torch.Generator().manual_seed(seed)


def _check(own: dict[str, Any]) -> None:
    for name in ("seed", "priority", "n"):
        value = own.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name}={value!r} must be a whole number.")
    if own.get("n") is not None and own["n"] < 1:
        raise ValueError(f"n={own['n']} must be 1 or more.")
    for name in ("logits_processor", "stopping_criteria"):
        if own.get(name) is not None and not isinstance(own[name], (list, tuple)):
            raise ValueError(f"{name}={own[name]!r} must be a list of them.")
