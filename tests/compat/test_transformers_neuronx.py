"""Old transformers-neuronx scripts on this library, compared with transformers and with the old loop written again."""

import json
import re
from pathlib import Path

import pytest
import scipy.stats
import torch
import transformers
from small_models import dequantized, tiny_opt
from transformers import OPTForCausalLM, TextStreamer

from optimum_opt_trn.compat import options, transformers_neuronx
from optimum_opt_trn.compat.transformers_neuronx import (
    GenerationConfig,
    HuggingFaceGenerationModelAdapter,
    NeuronConfig,
    OPTForSampling,
    QuantizationConfig,
    amp_callback,
    save_pretrained_split,
)


EOS = 2
LENGTH = 18


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    """A random OPT that would end soon after most prompts, if it were allowed to."""
    model = tiny_opt(vocab_size=96, num_attention_heads=4, max_position_embeddings=64)
    decoder = model.model.decoder
    with torch.no_grad():
        eos = decoder.embed_tokens.weight[EOS]
        decoder.final_layer_norm.bias += 10 * eos / eos.norm() ** 2
    return model


@pytest.fixture(scope="module")
def split(model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("split")
    save_pretrained_split(model, directory)
    return directory


@pytest.fixture(scope="module")
def loaded(split) -> OPTForSampling:
    return load(split, batch_size=3, amp="f32", tp_degree=1)


def load(split: Path, **kwargs) -> OPTForSampling:
    model = OPTForSampling.from_pretrained(split, n_positions=64, eager=True, **kwargs)
    model.to_neuron()
    return model


class Recorder:
    """A streamer that keeps what it receives."""

    def __init__(self):
        self.puts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ends += 1


@torch.no_grad()
def old_loop(model, input_ids, sequence_length, start_ids=None, top_k=50, eos=EOS):
    """What the old `sample` did, on transformers' OPT, drawing as this library does (one uniform a row and step)."""
    tokens = input_ids
    start_ids = torch.zeros(len(tokens), dtype=torch.long) if start_ids is None else start_ids
    while tokens.shape[1] < sequence_length:
        mask = (torch.arange(tokens.shape[1]) >= start_ids[:, None]).long()
        scores = model(input_ids=tokens, attention_mask=mask).logits[:, -1].float()
        scores[:, eos] = -torch.inf
        best, ids = torch.topk(scores, top_k)
        cumulative = best.softmax(-1).cumsum(-1)
        drawn = (cumulative <= torch.rand(len(tokens))[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
        tokens = torch.cat([tokens, ids.gather(1, drawn)], dim=1)
    return tokens


def prompts(batch: int, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sample_is_the_old_loop(model, split, tp_degree, batch):
    ours = load(split, batch_size=batch, amp="f32", tp_degree=tp_degree)
    input_ids = prompts(batch)
    start_ids = torch.tensor([0, 3, 6])[:batch]
    for top_k, starts in ((1, start_ids), (5, None), (40, start_ids.int())):
        torch.manual_seed(top_k)
        expected = old_loop(model, input_ids, LENGTH, starts, top_k)
        torch.manual_seed(top_k)
        with torch.inference_mode():
            result = ours.sample(input_ids, sequence_length=LENGTH, start_ids=starts, top_k=top_k)
        assert result.dtype == torch.int64 and result.shape == (batch, LENGTH)
        assert torch.equal(result, expected)
        assert not (result[:, input_ids.shape[1] :] == EOS).any()


def test_the_model_would_choose_eos_if_it_could(model):
    scores = model(prompts(3)).logits[:, -1]
    assert (scores.argmax(-1) == EOS).all(), "else the tests above do not show that EOS is left out"


def test_left_padding_does_not_change_a_row(loaded):
    prompt = prompts(1)
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), prompt], dim=1)
    torch.manual_seed(1)
    alone = loaded.sample(prompt, 20, top_k=10)
    torch.manual_seed(1)
    result = loaded.sample(padded, 24, start_ids=torch.tensor([4]), top_k=10)
    assert torch.equal(result[:, 4:], alone)
    assert (result[:, :4] == 1).all()


def test_tokens_are_drawn_as_often_as_transformers_would(model, split):
    batch, calls, top_k = 64, 30, 12
    ours = load(split, batch_size=batch, amp="f16", tp_degree=2)
    prompt = prompts(1)
    torch.manual_seed(0)
    drawn = torch.cat([ours.sample(prompt.repeat(batch, 1), 8, top_k=top_k)[:, -1] for _ in range(calls)])
    scores = model(prompt).logits[0, -1].detach()
    scores[EOS] = -torch.inf
    best, ids = scores.topk(top_k)
    counts = torch.stack([(drawn == i).sum() for i in ids])
    assert counts.sum() == len(drawn), "a token beyond the top_k best was drawn"
    expected = best.softmax(-1) * len(drawn)
    assert scipy.stats.chisquare(counts, expected.double() / expected.double().sum() * len(drawn)).pvalue > 1e-3


def test_padding_is_told_by_start_ids_only(model, loaded):
    """A pad token in a prompt without start_ids was a token like any other."""
    input_ids = prompts(2)
    input_ids[:, :2] = 1
    torch.manual_seed(3)
    expected = old_loop(model, input_ids, LENGTH, None, 10)
    torch.manual_seed(3)
    assert torch.equal(loaded.sample(input_ids, LENGTH, top_k=10), expected)


def test_streamer_gets_new_tokens_only(loaded):
    recorder = Recorder()
    input_ids = prompts(2)
    result = loaded.sample(input_ids, LENGTH, streamer=recorder)
    assert all(value.shape == (2, 1) for value in recorder.puts)
    assert torch.equal(torch.cat(recorder.puts, dim=1), result[:, input_ids.shape[1] :])
    assert recorder.ends == 1


def test_a_prompt_that_is_long_enough_comes_back(loaded):
    recorder = Recorder()
    input_ids = prompts(2).int()
    result = loaded.sample(input_ids, 5, streamer=recorder)
    assert torch.equal(result, input_ids.long()) and result.dtype == torch.int64
    assert (recorder.puts, recorder.ends) == ([], 1)


def test_generation_config_json_is_not_looked_at(model, split, tmp_path):
    """The old loop did not read it, so sampling defaults in it must not apply."""
    save_pretrained_split(model, tmp_path)
    transformers.GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        repetition_penalty=3.0,
        eos_token_id=[5, 6],
        pad_token_id=1,
    ).save_pretrained(tmp_path)
    ours = load(tmp_path, batch_size=2, amp="f32", tp_degree=2)
    torch.manual_seed(7)
    expected = old_loop(model, prompts(2), LENGTH, None, 30)
    torch.manual_seed(7)
    assert torch.equal(ours.sample(prompts(2), LENGTH, top_k=30), expected)


def test_other_eos_token(model, split):
    ours = load(split, batch_size=1, amp="f32", tp_degree=2, eos_token_id=7)
    torch.manual_seed(0)
    expected = old_loop(model, prompts(1), LENGTH, None, 20, eos=7)
    torch.manual_seed(0)
    result = ours.sample(prompts(1), LENGTH, top_k=20)
    assert torch.equal(result, expected)
    assert (result == EOS).any()


def test_the_published_opt_13b_script(model, tmp_path):
    """AWS's sample, with a small model and another directory; otherwise only import lines differ."""
    checkpoint, directory = tmp_path / "opt", str(tmp_path / "opt-split")
    model.save_pretrained(checkpoint)

    def amp_callback(model, dtype):
        for block in model.model.decoder.layers:
            block.self_attn.to(dtype)
            block.fc1.to(dtype)
            block.fc2.to(dtype)
        model.lm_head.to(dtype)

    hf_model = OPTForCausalLM.from_pretrained(checkpoint, low_cpu_mem_usage=True)
    amp_callback(hf_model, torch.float16)
    save_pretrained_split(hf_model, directory)
    neuron_model = OPTForSampling.from_pretrained(directory, batch_size=2, tp_degree=2, amp="f16", n_positions=64)
    neuron_model.to_neuron()
    input_ids = prompts(2)
    with torch.inference_mode():
        generated_sequences = neuron_model.sample(input_ids, sequence_length=64, top_k=40)
    assert generated_sequences.shape == (2, 64)
    assert torch.equal(generated_sequences[:, :7], input_ids)
    # Weights of these dtypes, computed in float32.
    reference = OPTForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = reference(input_ids).logits[:, -1]
    assert (neuron_model(input_ids) - expected).abs().max() < 2e-2 * expected.std()


def test_positional_arguments(split):
    ours = OPTForSampling.from_pretrained(split, 2, "bf16", 4, [32, 64], None, [16, 32], 1, NeuronConfig())
    ours._export_options["eager"] = True
    ours.to_neuron()
    config = ours._loaded().neuron_config
    assert (config.batch_size, config.amp, config.tp_degree, config.sequence_length) == (2, "bf16", 4, 64)
    assert (config.cache_buckets, config.prompt_buckets) == ((32, 64), (16, 32, 64))
    assert ours.sample(prompts(2, length=40), 50, None, 10, None).shape == (2, 50)
    assert (ours.config.n_positions, ours.config.batch_size, ours.config.amp, ours.config.tp_degree) == (
        64,
        2,
        "bf16",
        4,
    )


def test_inside_and_outside_of_inference_mode(split):
    with torch.inference_mode():
        ours = load(split, batch_size=1, tp_degree=1)
        torch.manual_seed(0)
        first = ours.sample(prompts(1), 12, top_k=10)
    torch.manual_seed(0)
    assert torch.equal(ours.sample(prompts(1), 12, top_k=10), first)


@pytest.mark.parametrize("dtype, amp", [(None, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_save_pretrained_split_takes_amp_from_the_cast(tmp_path, dtype, amp):
    model = tiny_opt(vocab_size=96)
    if dtype is not None:
        amp_callback(model, dtype)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    assert save_pretrained_split(model, str(tmp_path)) == tmp_path
    for name, tensor in model.state_dict().items():
        pointer, value = before[name]
        assert tensor.data_ptr() == pointer and tensor.dtype == value.dtype and torch.equal(tensor, value), name
    ours = OPTForSampling.from_pretrained(tmp_path, n_positions=32)
    assert ours.config.amp == amp, "amp=None is the checkpoint's dtype"
    reloaded = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in reloaded.state_dict().items():
        rounded = "layer_norm" not in name and "embed_positions" not in name
        expected = before[name][1].to(dtype if rounded and dtype else torch.float32).float()
        assert torch.equal(tensor, expected), name


def test_save_pretrained_split_refuses_a_mixed_cast(tmp_path):
    model = tiny_opt()
    model.model.decoder.layers[-1].fc1.to(torch.float16)
    with pytest.raises(ValueError, match=r"different dtypes.*float16"):
        save_pretrained_split(model, tmp_path)
    with pytest.raises(TypeError, match="Linear"):
        save_pretrained_split(torch.nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("generation", [{}, {"do_sample": True, "top_k": 5}, {"dynamic": True, "top_p": 0.7}])
def test_on_device_generation(tmp_path, generation):
    """EOS ends rows only if it is named; rows that ended are filled with it."""
    model = tiny_opt(vocab_size=96, num_attention_heads=4, max_position_embeddings=64)
    save_pretrained_split(model, tmp_path)
    config = GenerationConfig(temperature=0.7, **generation)
    ours = load(tmp_path, batch_size=3, amp="f32", neuron_config=NeuronConfig(on_device_generation=config))
    input_ids = prompts(3)
    torch.manual_seed(0)
    endless = ours.sample(input_ids, LENGTH)
    assert endless.shape == (3, LENGTH), "without eos_token_id nothing ends"
    eos = int(endless[0, 12])
    ours.update_generation_config(GenerationConfig(temperature=0.7, eos_token_id=eos, **generation))
    torch.manual_seed(0)
    result = ours.sample(input_ids, LENGTH)
    greedy = not (config.do_sample or config.dynamic)
    tokens = input_ids
    torch.manual_seed(0)
    ended = torch.zeros(3, 1, dtype=torch.bool)
    while tokens.shape[1] < LENGTH and not ended.all():
        scores = model(tokens).logits[:, -1].detach() / (1 if greedy else 0.7)
        best, ids = scores.topk(config.top_k if config.top_k < 96 else 96)
        weights = best.softmax(-1)
        if not greedy and config.top_p < 1:
            weights = weights * (weights.cumsum(-1) - weights < config.top_p)
        uniforms = torch.rand(3)[:, None] if not greedy else torch.zeros(3, 1)
        cumulative = weights.cumsum(-1)
        new = ids.gather(1, (cumulative <= uniforms * cumulative[:, -1:]).sum(-1, keepdim=True))
        new = torch.where(ended, eos, new)
        ended |= new == eos
        tokens = torch.cat([tokens, new], dim=1)
    assert torch.equal(result, tokens)
    assert (result[0, 13:] == eos).all() and not torch.equal(result, endless)


def test_adapter(model, loaded):
    config = transformers.OPTConfig(**model.config.to_dict())
    adapter = HuggingFaceGenerationModelAdapter(config, loaded).eval()
    adapter.reset_generation()
    input_ids = prompts(2)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    result = adapter.generate(input_ids=input_ids, attention_mask=mask, max_length=LENGTH, do_sample=False)
    expected = model.generate(input_ids=input_ids, attention_mask=mask, max_length=LENGTH, do_sample=False)
    assert torch.equal(result, expected)


def test_forward_gives_the_logits_after_the_prompt(model, loaded):
    input_ids = prompts(2)
    starts = torch.tensor([0, 2])
    mask = (torch.arange(7) >= starts[:, None]).long()
    expected = model(input_ids, attention_mask=mask).logits[:, -1]
    result = loaded(input_ids, torch.arange(7), starts)
    assert result.dtype == torch.float32 and result.shape == (2, 96)
    assert (result - expected).abs().max() < 1e-3 * expected.std()
    with pytest.raises(NotImplementedError, match="cache_ids"):
        loaded(input_ids[:, -1:], torch.tensor([7]), starts)


def test_save_and_load(split, loaded, tmp_path):
    directory = tmp_path / "artifacts"
    loaded.save(directory)
    again = OPTForSampling.from_pretrained(split, n_positions=64, batch_size=3, amp="f32", tp_degree=1, eager=True)
    again.load(directory)
    again.to_neuron()
    torch.manual_seed(0)
    expected = loaded.sample(prompts(3), LENGTH, top_k=20)
    torch.manual_seed(0)
    assert torch.equal(again.sample(prompts(3), LENGTH, top_k=20), expected)
    other = OPTForSampling.from_pretrained(split, n_positions=64, batch_size=2, amp="f32", tp_degree=1, eager=True)
    other.load(directory)
    with pytest.raises(ValueError, match="batch_size=3.*2"):
        other.to_neuron()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        other.load(tmp_path / "nowhere")


def test_load_refuses_another_models_weights(loaded, tmp_path):
    loaded.save(tmp_path / "artifacts")
    other = tiny_opt(vocab_size=96, num_attention_heads=4, max_position_embeddings=64)
    with torch.no_grad():
        other.model.decoder.layers[-1].fc2.weight += 0.01
    save_pretrained_split(other, tmp_path / "other")
    ours = OPTForSampling.from_pretrained(tmp_path / "other", 3, "f32", 1, 64, eager=True)
    ours.load(tmp_path / "artifacts")
    with pytest.raises(ValueError, match="weights"):
        ours.to_neuron()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"unroll": 1}, NotImplementedError, "unroll=1.*Leave it out"),
        ({"context_unroll": 8}, NotImplementedError, "context_unroll=8"),
        ({"context_length_estimate": 0}, NotImplementedError, "context_length_estimate=0"),
        ({"context_length_estimate": 128}, ValueError, "exceeds n_positions=64"),
        ({"amp": "int8"}, ValueError, "int8"),
        ({"n_positions": 2048}, ValueError, "2048.*64 positions.*n_positions=64"),
        ({"hidden_size": 1024}, NotImplementedError, "hidden_size=1024.*config.json"),
        ({"batchsize": 2}, TypeError, "batch_size"),
        ({"eos_token": 2}, TypeError, "eos_token_id"),
        ({"neuron_config": {"fuse_qkv": True}}, TypeError, "import NeuronConfig from"),
    ],
)
def test_options_that_are_refused(split, arguments, error, message):
    with pytest.raises(error, match=message):
        OPTForSampling.from_pretrained(split, **{"n_positions": 64, **arguments})


def test_a_top_k_above_max_topk(model, split):
    small = load(split, batch_size=1, amp="f32", tp_degree=1, max_topk=8)
    for top_k in (8, 9):
        torch.manual_seed(0)
        expected = old_loop(model, prompts(1), LENGTH, None, top_k)
        torch.manual_seed(0)
        assert torch.equal(small.sample(prompts(1), LENGTH, top_k=top_k), expected)


def test_options_that_asked_for_nothing(split, model):
    layers = model.config.num_hidden_layers
    OPTForSampling.from_pretrained(split, n_positions=64, unroll=layers, context_unroll=layers, hidden_size=None)


def test_pipeline_parallelism_is_refused(split, monkeypatch):
    monkeypatch.setenv("NEURON_PP_STAGES", "2")
    with pytest.raises(NotImplementedError, match="NEURON_PP_STAGES='2'"):
        OPTForSampling.from_pretrained(split, n_positions=64)


@pytest.mark.parametrize("name", options._NEURON_CONFIG_FIELDS)
def test_every_neuron_config_field_is_mapped_or_refused(name):
    default, reason = options._NEURON_CONFIG_FIELDS[name]
    NeuronConfig(**{name: default})
    if reason is not None:
        with pytest.raises(NotImplementedError, match=rf"NeuronConfig\({name}\)=.*: {re.escape(reason)}"):
            NeuronConfig(**{name: "something else"})


def test_neuron_config_spellings():
    with pytest.raises(TypeError, match="on_device_generation"):
        NeuronConfig(on_device_generatio=None)
    for name, value in {"max_length": 9, "top_p_min_tokens": 2, "global_top_k": 64, "per_batch_line": True}.items():
        with pytest.raises(NotImplementedError, match=name):
            GenerationConfig(**{name: value})


def test_calls_that_are_refused(split, loaded):
    with pytest.raises(RuntimeError, match="to_neuron"):
        OPTForSampling.from_pretrained(split, n_positions=64).sample(prompts(1), 10)
    with pytest.raises(ValueError, match="sequence_length=65 exceeds n_positions=64"):
        loaded.sample(prompts(1), 65)
    for top_k in (0, -1, 97):
        with pytest.raises(ValueError, match=f"top_k={top_k}"):
            loaded.sample(prompts(1), 10, top_k=top_k)
    for starts in ([7], [-1], [0, 0]):
        with pytest.raises(ValueError, match="start_ids"):
            loaded.sample(prompts(1), 10, start_ids=torch.tensor(starts))
    with pytest.raises(ValueError, match="input_ids"):
        loaded.sample(prompts(1)[0], 10)
    with pytest.raises(ValueError, match="streamer is for one batch"):
        loaded.sample(prompts(4), 10, streamer=TextStreamer(None))


@pytest.mark.parametrize(
    "how",
    [
        {"amp": "f32-u8-f32"},
        {"neuron_config": NeuronConfig(quant=QuantizationConfig(quant_dtype="s8", dequant_dtype="f32"))},
    ],
    ids=["amp", "quant"],
)
def test_int8_weights(how, tmp_path):
    source = tiny_opt(max_position_embeddings=64)
    source.save_pretrained(tmp_path)
    ours = load(tmp_path, batch_size=2, **how)
    made = ours._model.neuron_config
    assert (made.amp, made.weight_dtype) == ("f32", "int8")
    ids = prompts(2)
    with torch.inference_mode():
        expected = dequantized(source)(ids).logits[:, -1]
    torch.testing.assert_close(ours(ids), expected, atol=1e-3, rtol=1e-4)
    ours.save(tmp_path / "artifacts")
    ours.load(tmp_path / "artifacts")
    ours.to_neuron()
    torch.testing.assert_close(ours(ids), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"quant_dtype": "f8e4m3fn"},
        {"quantize_method": "direct_cast"},
        {"quantize_attn": False},
        {"no_quantize_list": ["fc1"]},
    ],
)
def test_other_quantization_is_refused(options):
    with pytest.raises(NotImplementedError, match=f"QuantizationConfig.{next(iter(options))}.*Leave it out"):
        QuantizationConfig(**options)


def test_names_that_are_gone(loaded):
    for name in ("LlamaForSampling", "OPTForGreedySearch"):
        with pytest.raises(ImportError, match=name):
            getattr(transformers_neuronx, name)
    assert not hasattr(transformers_neuronx, "something")
    with pytest.raises(AttributeError, match="cpu_compile.*optimum-cli"):
        loaded.cpu_compile()
    assert not hasattr(loaded, "something")
    loaded.reset()
    assert loaded.eval() is loaded


def test_old_split_checkpoint_and_other_models(tmp_path, model, loaded):
    old = tmp_path / "old" / "pytorch_model.bin"
    old.mkdir(parents=True)
    names = {name: f"p{index}.{name}" for index, name in enumerate(model.state_dict())}
    for name, tensor in model.state_dict().items():
        torch.save(tensor, old / names[name])
    (old / "key_to_filename.json").write_text(json.dumps(names))
    model.config.save_pretrained(old.parent)
    again = load(old.parent, batch_size=3, amp="f32", tp_degree=2)
    torch.testing.assert_close(again.forward(prompts(3)), loaded.forward(prompts(3)))
    (old / "key_to_filename.json").write_text("{}")
    with pytest.raises(ValueError, match="key_to_filename.json is not a checkpoint index"):
        load(old.parent)
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="gpt2"):
        OPTForSampling.from_pretrained(tmp_path / "gpt2")


def test_the_migration_page_names_every_option():
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    for name in (*options._NEURON_CONFIG_FIELDS, "unroll", "context_unroll", "n_positions", "start_ids", "amp"):
        assert name in page, name
