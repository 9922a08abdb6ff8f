"""generate() against transformers' own: the same tokens, whatever the kind, degree, batch or padding."""

from __future__ import annotations

import functools

import pytest
import torch
from against_transformers import assert_distributed
from small_models import KINDS, SHIPPED_MODEL, rounded, tiny_opt
from transformers import AutoTokenizer, GenerationConfig, OPTForCausalLM, TextStreamer, set_seed
from transformers.generation import CompileConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets import Runtime, Step, StepResult


NEW_TOKENS = 130

# No end-of-sequence id, so that all rows go on; transformers would else stop where random weights say so.
ENDLESS = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 1}


def prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a batch; `holed` has padding at the left, and one masked token within each row."""
    width = max(map(len, rows)) + (1 if side == "holed" else 0)
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens, counts = list(row), [1] * len(row)
        if side == "holed":
            tokens.insert(len(row) // 2, 3)
            counts.insert(len(row) // 2, 0)
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[i, place], mask[i, place] = torch.tensor(tokens), torch.tensor(counts)
    return ids, mask


def greedy_alone(reference: OPTForCausalLM, row: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """transformers' continuation of one row, and how much better each of its tokens was than the next best, in σ."""
    out = reference.generate(
        torch.tensor([row]),
        **{**ENDLESS, "max_new_tokens": count},
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits)[:, 0]
    best = logits.topk(2).values
    return out.sequences[0, len(row) :].tolist(), (best[:, 0] - best[:, 1]) / logits.std(-1)


def assert_same_tokens(ours: list[int], theirs: list[int], margins: torch.Tensor) -> None:
    """Equal up to the first place where the reference's two best were within 1e-4 σ of each other."""
    undecided = (margins < 1e-4).nonzero().flatten().tolist()
    end = undecided[0] if undecided else len(theirs)
    assert ours[:end] == theirs[:end]
    assert end > len(theirs) // 2, "the random model is no test: its choices are too close"


@functools.cache
def expected_of_kind(kind: str) -> list[tuple[list[int], torch.Tensor]]:
    source = tiny_opt(**KINDS[kind])
    rows = prompts([9, 3, 14, 1], source.config.vocab_size)
    return [greedy_alone(rounded(source), row, NEW_TOKENS) for row in rows]


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers(kind, tp_degree, load_opt):
    source = tiny_opt(**KINDS[kind])
    rows = prompts([9, 3, 14, 1], source.config.vocab_size)
    expected = expected_of_kind(kind)
    model = load_opt(source, batch_size=4, tp_degree=tp_degree, sequence_length=160, kv_cache_dtype="f32")
    for batch in (1, 3, 4):
        ids, mask = padded(rows[:batch], "left")
        out = model.generate(ids, attention_mask=mask, **ENDLESS)
        for row, (tokens, margins) in zip(out, expected[:batch], strict=True):
            assert_same_tokens(row[ids.shape[1] :].tolist(), tokens, margins)


@pytest.mark.parametrize("side", ["left", "right", "holed"])
def test_each_row_is_as_if_alone(side, load_opt):
    source = tiny_opt()
    rows = prompts([5, 17, 2], source.config.vocab_size)
    model = load_opt(source, batch_size=3, sequence_length=96, kv_cache_dtype="f32")
    ids, mask = padded(rows, side)
    together = model.generate(ids, attention_mask=mask, **{**ENDLESS, "max_new_tokens": 60})
    for row, out in zip(rows, together, strict=True):
        alone, _ = greedy_alone(rounded(source), row, 60)
        assert out[ids.shape[1] :].tolist() == alone


@pytest.mark.parametrize(("amp", "cache", "limit"), [("f16", None, 2e-2), ("bf16", None, 2e-2), ("f16", "f32", 1e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_position(kind, amp, cache, limit, load_opt):
    source = tiny_opt(**KINDS[kind])
    reference = rounded(source, {"f16": torch.float16, "bf16": torch.bfloat16}[amp])
    model = load_opt(source, batch_size=3, tp_degree=2, sequence_length=96, amp=amp, kv_cache_dtype=cache)
    rows = prompts([30, 11, 50], source.config.vocab_size)
    ids, mask = padded(rows, "left")
    ours = model(ids, mask).logits
    for i, row in enumerate(rows):
        with torch.no_grad():
            theirs = reference(torch.tensor([row])).logits[0]
        worst = (ours[i, mask[i].bool()] - theirs).abs().max() / theirs.std()
        assert worst < limit


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_shipped_model_equals_transformers(tp_degree):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL, padding_side="left")
    reference = OPTForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    options = {"batch_size": 3, "sequence_length": 192, "tp_degree": tp_degree, "kv_cache_dtype": "f32"}
    model = NeuronOPTForCausalLM.from_pretrained(SHIPPED_MODEL, eager=True, **options)
    texts = ["It was", "Mr. Knightley seemed to be trying not to smile", "Her father"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ours = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ours, reference.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS))


def step(runtime: Runtime, tokens: list[int], filled: int) -> StepResult:
    """New tokens of slot 0; the logits of the last."""
    ids, places = torch.tensor(tokens, dtype=torch.int32), torch.arange(len(tokens))
    last = torch.tensor([len(tokens) - 1])
    result = runtime.step(Step(ids, torch.zeros_like(places), filled + places, last, SamplingInputs.greedy(1)))
    return result.tokens, result.logits


def test_default_cache_is_within_its_tolerance_while_decoding(load_opt):
    source = tiny_opt()
    model = load_opt(source, batch_size=1, sequence_length=96)
    assert model.neuron_config.kv_cache_dtype == "f16"
    (row,) = prompts([8], source.config.vocab_size)
    reference, sequence = rounded(source), list(row)
    tokens, logits = step(model.runtime, row, 0)
    for _ in range(60):
        with torch.no_grad():
            theirs = reference(torch.tensor([sequence])).logits[0, -1]
        assert (logits[0] - theirs).abs().max() < 2e-2 * theirs.std()
        sequence.append(int(tokens))
        tokens, logits = step(model.runtime, [int(tokens)], len(sequence) - 1)


def test_end_of_sequence_fills_with_padding_as_transformers_does(load_opt):
    source = tiny_opt()
    reference = rounded(source)
    ids, mask = padded(prompts([4, 9], source.config.vocab_size), "left")
    free = reference.generate(ids, attention_mask=mask, **{**ENDLESS, "max_new_tokens": 40})
    # Ids that the rows come to at different places.
    ends = [int(free[0, ids.shape[1] + 5]), int(free[1, ids.shape[1] + 20])]
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": ends, "pad_token_id": 1}
    model = load_opt(source, batch_size=2, sequence_length=96, kv_cache_dtype="f32")
    for lengths in ({}, {"min_new_tokens": 12}, {"min_length": 22}):
        theirs = reference.generate(ids, attention_mask=mask, **options, **lengths)
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **lengths), theirs)


@pytest.mark.parametrize("limits", [{"max_length": 30}, {"max_new_tokens": 7}, {}])
def test_lengths_as_transformers(limits, load_opt):
    source = tiny_opt(max_position_embeddings=64)
    ids = torch.tensor(prompts([12], source.config.vocab_size))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, **limits}
    model = load_opt(source, batch_size=1, kv_cache_dtype="f32")
    assert torch.equal(model.generate(ids, **options), rounded(source).generate(ids, **options))


def test_stopping_criteria_of_the_caller(load_opt):
    model = load_opt(tiny_opt(), batch_size=1, sequence_length=64)
    ids = torch.tensor([[5, 6, 7]])
    criteria = StoppingCriteriaList([MaxLengthCriteria(9)])
    out = model.generate(ids, stopping_criteria=criteria, eos_token_id=None, max_new_tokens=20, max_time=600.0)
    assert out.shape == (1, 9)


def test_seeded_sampling_is_the_same_at_every_degree(load_opt):
    source = tiny_opt()
    ids, mask = padded(prompts([6, 11], source.config.vocab_size), "left")
    options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "max_new_tokens": 60}
    outputs = []
    for tp_degree in (1, 2, 4):
        model = load_opt(source, batch_size=3, tp_degree=tp_degree, sequence_length=96, kv_cache_dtype="f32")
        set_seed(11)
        outputs.append(model.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=1, **options))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    set_seed(12)
    assert not torch.equal(outputs[0], model.generate(ids, attention_mask=mask, eos_token_id=None, **options))


@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_k": 8, "temperature": 1.7}, {"top_k": 40, "top_p": 0.6}])
def test_sampled_tokens_have_the_distribution_of_transformers(options, load_opt):
    source = tiny_opt(vocab_size=64)
    reference = rounded(source)
    model = load_opt(source, batch_size=40, sequence_length=16, kv_cache_dtype="f32")
    row = prompts([5], 64)[0]
    ids = torch.tensor([row])
    out = reference.generate(
        ids, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **options
    )
    set_seed(3)
    drawn = [model.generate(ids.repeat(40, 1), do_sample=True, max_new_tokens=1, **options) for _ in range(100)]
    assert_distributed(torch.cat(drawn)[:, -1], out.scores[0][0])


def test_num_return_sequences_are_rows(load_opt):
    model = load_opt(tiny_opt(), batch_size=3, sequence_length=32)
    out = model.generate(torch.tensor([[5, 6]]), do_sample=True, num_return_sequences=3, max_new_tokens=20)
    assert out.shape[0] == 3 and len({tuple(row) for row in out.tolist()}) == 3


def test_streamer_prints_what_is_returned(capsys):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    model = NeuronOPTForCausalLM.from_pretrained(SHIPPED_MODEL, eager=True, sequence_length=64)
    batch = tokenizer("It was a", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=20, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0]).strip()


REFUSED = {
    "cache_implementation": {"cache_implementation": "static"},
    "return_legacy_cache": {"return_legacy_cache": True},
    "compile_config": {"compile_config": CompileConfig()},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "num_beam_groups": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "force_words_ids": {"num_beams": 2, "force_words_ids": [[5]]},
    "synced_gpus": {"synced_gpus": True},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 3, 32)},
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2]])},
    "past_key_values": {"past_key_values": object()},
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_not_served_raises_by_name(asked, load_opt):
    model = load_opt(tiny_opt(), batch_size=2, sequence_length=32)
    # An option that transformers 5 has no more is unknown there.
    gone = asked == "return_legacy_cache" and not hasattr(GenerationConfig(), asked)
    kinds = TypeError if gone else (NotImplementedError, ValueError)
    with pytest.raises(kinds, match=asked if asked != "num_beam_groups" else "group beam"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, **REFUSED[asked])


class StreamToNowhere(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


BAD_PROMPTS = {
    "too long": (torch.full((1, 33), 5), {}, "33 tokens.*sequence_length=32"),
    "full": (torch.full((1, 32), 5), {}, "32 tokens.*no room.*sequence_length=32"),
    "no room": (torch.full((1, 20), 5), {"max_new_tokens": 13}, "13 new ones.*sequence_length=32.*at most 12"),
    "too many beams": (torch.full((1, 4), 5), {"num_beams": 3}, "num_beams=3 make 3 rows.*batch_size=2"),
    "guided beams": (torch.full((1, 4), 5), {"num_beams": 2, "guidance_scale": 1.5}, "make 4 rows.*batch_size=2"),
    "streamed batches": (torch.full((3, 4), 5), {"streamer": StreamToNowhere()}, "streamer.*3 rows.*batch_size=2"),
    "no tokens": (torch.zeros(1, 0, dtype=torch.long), {}, "row 0 is empty"),
    "all masked": (torch.full((2, 3), 5), {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "row 1 is empty"),
    "id too large": (torch.tensor([[5, 128]]), {}, "Token id 128.*0 to 127"),
    "negative id": (torch.tensor([[5, -1]]), {}, "Token id -1"),
    "mask of another shape": (torch.full((1, 4), 5), {"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
    "not two-dimensional": (torch.tensor([5, 6]), {}, "shape"),
    "not whole numbers": (torch.tensor([[0.5]]), {}, "whole numbers"),
}


@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_bad_prompts_are_refused_before_any_work(bad, load_opt, monkeypatch):
    ids, options, message = BAD_PROMPTS[bad]
    model = load_opt(tiny_opt(), batch_size=2, sequence_length=32)
    for work in ("step", "copy"):
        monkeypatch.setattr(model.runtime, work, lambda *_: pytest.fail("the device was called"))
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **{"max_new_tokens": 4, **options})


def test_a_call_that_was_interrupted_leaves_the_next_one_right(load_opt):
    source = tiny_opt()
    model = load_opt(source, batch_size=2, sequence_length=64, kv_cache_dtype="f32")
    ids = torch.tensor([[5, 6, 7]])

    class Interrupt(TextStreamer):
        def __init__(self):
            self.seen = 0

        def put(self, value):
            self.seen += 1
            if self.seen == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.tensor([[9, 9], [8, 7]]), streamer=Interrupt(), **ENDLESS | {"max_new_tokens": 30})
    options = ENDLESS | {"max_new_tokens": 30}
    assert torch.equal(model.generate(ids, **options), rounded(source).generate(ids, **options))


def test_a_generation_config_object_is_obeyed(load_opt):
    source = tiny_opt()
    model = load_opt(source, batch_size=1, sequence_length=64, kv_cache_dtype="f32")
    config = GenerationConfig(max_length=24, do_sample=False, eos_token_id=None, pad_token_id=1)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        model.generate(ids, generation_config=config), rounded(source).generate(ids, generation_config=config)
    )


def test_padding_is_inferred_as_transformers_infers_it(load_opt):
    source = tiny_opt()
    model = load_opt(source, batch_size=2, sequence_length=32, kv_cache_dtype="f32")
    ids = torch.tensor([[1] * 28 + [5, 6, 7], [1] * 27 + [9, 8, 7, 6]])
    for special in ({"pad_token_id": 1, "eos_token_id": None}, {"pad_token_id": 1, "eos_token_id": [2, 3]}):
        options = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12, **special}
        assert torch.equal(model.generate(ids, **options), rounded(source).generate(ids, **options))
    start = torch.tensor([[2]])
    options = {"do_sample": False, "pad_token_id": 2, "eos_token_id": 2, "max_new_tokens": 12}
    assert torch.equal(model.generate(start, **options), rounded(source).generate(start, **options))
    assert torch.equal(model.generate(bos_token_id=2, **options), rounded(source).generate(bos_token_id=2, **options))
