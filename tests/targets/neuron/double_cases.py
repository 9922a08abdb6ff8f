"""The Neuron target end to end on the double; run by test_target.py, each time in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
import double


double.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from double import runtime as cores  # noqa: E402
from small_models import rounded, tiny_config, tiny_opt  # noqa: E402

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig  # noqa: E402
from optimum_opt_trn.buckets import EXTENSION  # noqa: E402
from optimum_opt_trn.checkpoint import CheckpointError  # noqa: E402
from optimum_opt_trn.checkpoint.quantization import quantization_config  # noqa: E402
from optimum_opt_trn.targets import TargetError  # noqa: E402
from optimum_opt_trn.targets.neuron import host, process  # noqa: E402
from optimum_opt_trn.targets.neuron.artifacts import _graph_key  # noqa: E402


SEQUENCE = 48
OPTIONS = {"batch_size": 3, "sequence_length": SEQUENCE, "prompt_buckets": (16, 48), "cache_buckets": (24, 48)}


class Host:
    """An instance with NeuronCores."""

    def __init__(self, monkeypatch, family: str = "trn1", count: int = 8):
        monkeypatch.setattr(host, "get_neuron_major", lambda: 1 if count else -1)
        monkeypatch.setattr(host, "current_instance_type", lambda: family)
        monkeypatch.setattr(host, "get_neuron_devices_count", lambda: count)
        monkeypatch.setattr(host, "cores_per_device", lambda: 1)


@pytest.fixture(autouse=True)
def neuron_host(monkeypatch, tmp_path):
    """An instance, and a process that has loaded nothing yet."""
    monkeypatch.setattr(process, "_claim", None)
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path / "compile-cache"))
    return Host(monkeypatch)


def export(tmp_path: Path, model, name: str = "export", eager: bool = False, **options) -> Path:
    model.save_pretrained(tmp_path / f"{name}-source")
    config = OPTNeuronConfig(**{**OPTIONS, "instance_type": "inf2", **options})
    exported = NeuronOPTForCausalLM.export(tmp_path / f"{name}-source", config, eager=eager)
    exported.save_pretrained(tmp_path / name)
    return tmp_path / name


def ragged(vocabulary: int) -> dict[str, torch.Tensor]:
    """Three prompts of 13, 20 and 4 tokens, padded at the left."""
    ids = torch.randint(4, vocabulary, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :16] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 1}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", [{}, {"vocab_size": 203, "tie_word_embeddings": False}], ids=["tied", "odd, untied"])
def test_tokens_are_those_of_transformers_and_of_the_cpu(tp, kind, tmp_path):
    model = tiny_opt(**kind)
    prompts = ragged(model.config.vocab_size)
    neuron = NeuronOPTForCausalLM.from_pretrained(export(tmp_path, model, amp="f32", tp_degree=tp))
    tokens = neuron.generate(**prompts, **GREEDY)
    assert tokens.tolist() == rounded(model, torch.float32).generate(**prompts, **GREEDY).tolist()
    options = {**OPTIONS, "tp_degree": tp, "amp": "f32", "eager": True}
    cpu = NeuronOPTForCausalLM.from_pretrained(tmp_path / "export-source", **options)
    sampled = {**GREEDY, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3}
    results = []
    for loaded in (neuron, cpu):
        torch.manual_seed(5)
        results.append(loaded.generate(**prompts, **sampled).tolist())
    assert results[0] == results[1] != tokens.tolist()


@pytest.mark.parametrize("amp", ["f16", "bf16"])
def test_16_bits_to_their_rounding(amp, tmp_path):
    model = tiny_opt()
    prompts = ragged(model.config.vocab_size)
    out = export(tmp_path, model, amp=amp, tp_degree=2)
    loaded = NeuronOPTForCausalLM.from_pretrained(out)
    eager = NeuronOPTForCausalLM.from_pretrained(out, eager=True)
    reference = rounded(model, loaded.dtype)(**prompts).logits[:, -1]
    for ours in (loaded, eager):
        logits = ours(**prompts, logits_to_keep=1).logits[:, -1]
        assert (logits - reference).abs().max() < {"f16": 2e-2, "bf16": 16e-2}[amp] * reference.std()


def test_speculation_in_pieces_beams_and_batches(tmp_path):
    """`extend` beyond one piece, `cache_copy`, idle rows, rewinding."""
    model = tiny_opt()
    prompts = ragged(model.config.vocab_size)
    reference = rounded(model, torch.float32)
    loaded = NeuronOPTForCausalLM.from_pretrained(export(tmp_path, model, amp="f32", tp_degree=2))
    more = torch.randint(4, 128, (3, EXTENSION + 7), generator=torch.Generator().manual_seed(2))
    first = loaded(**prompts)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(more)], dim=1)
    second = loaded(more, attention_mask=mask, past_key_values=first.past_key_values).logits
    whole = reference(torch.cat([prompts["input_ids"], more], dim=1), attention_mask=mask).logits
    assert (second - whole[:, 20:]).abs().max() < 1e-3 * whole.std()
    one = {"input_ids": prompts["input_ids"][1:2], "attention_mask": prompts["attention_mask"][1:2]}
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        options = {**GREEDY, "eos_token_id": 2, **options}  # transformers' look-up needs one
        assert loaded.generate(**one, **options).tolist() == reference.generate(**one, **options).tolist(), options
    five = {name: torch.cat([tensor, tensor[:2]]) for name, tensor in prompts.items()}
    assert loaded.generate(**five, **GREEDY).tolist() == reference.generate(**five, **GREEDY).tolist()


EMBEDDINGS_NEED_A_GRAPH = "inputs_embeds.* is not served: .* export the model again with prompt_embeddings=True"


@pytest.mark.parametrize(
    ("tp", "kind"), [(2, {}), (1, {"do_layer_norm_before": False, "word_embed_proj_dim": 32})], ids=["pre", "post"]
)
def test_prompts_as_embeddings(tp, kind, tmp_path):
    """Ragged, in pieces, with beams and more prompts than slots, and going on with embeddings."""
    model = tiny_opt(**kind)
    prompts, reference = ragged(model.config.vocab_size), rounded(model, torch.float32)
    buckets = {"prompt_buckets": (48,), "cache_buckets": (48,)}
    out = export(tmp_path, model, amp="f32", tp_degree=tp, prompt_embeddings=True, **buckets)
    loaded = NeuronOPTForCausalLM.from_pretrained(out)
    embeds, mask = loaded.get_input_embeddings()(prompts["input_ids"]), prompts["attention_mask"]
    embeds = embeds + 0.1 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(3))  # of no words
    call = {"inputs_embeds": embeds, "attention_mask": mask, **GREEDY}
    assert loaded.generate(**call).tolist() == reference.generate(**call).tolist()
    one = {**call, "inputs_embeds": embeds[1:2], "attention_mask": mask[1:2], "num_beams": 3}
    assert loaded.generate(**one).tolist() == reference.generate(**one).tolist()
    five = {**call, "inputs_embeds": embeds[[0, 1, 2, 0, 1]], "attention_mask": mask[[0, 1, 2, 0, 1]]}
    assert loaded.generate(**five).tolist() == reference.generate(**five).tolist()
    with torch.no_grad():
        whole = reference(inputs_embeds=embeds, attention_mask=mask).logits
    first = loaded(inputs_embeds=embeds[:, :17], attention_mask=mask[:, :17])
    second = loaded(inputs_embeds=embeds[:, 17:], attention_mask=mask, past_key_values=first.past_key_values)
    differences = torch.cat([first.logits, second.logits], dim=1) - whole
    assert differences[mask.bool()].abs().max() < 1e-3 * whole.std()


def test_what_the_graphs_do_not_serve_is_refused_by_name(tmp_path):
    out = export(tmp_path, tiny_opt(), amp="f32")
    loaded, ids = NeuronOPTForCausalLM.from_pretrained(out), torch.tensor([[5, 6, 7]])
    embeds = loaded.get_input_embeddings()(ids)
    for call in (loaded, loaded.generate):
        with pytest.raises(NotImplementedError, match=EMBEDDINGS_NEED_A_GRAPH):
            call(inputs_embeds=embeds)
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(NotImplementedError, match=f"{name}.* is not served: the graphs return logits only"):
                call(ids, **{name: True})
    eager = NeuronOPTForCausalLM.from_pretrained(out, eager=True)
    assert len(eager(inputs_embeds=embeds, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_no_more_than_a_layer_is_staged(tp, tmp_path):
    out = export(tmp_path, tiny_opt(num_hidden_layers=5), amp="f16", tp_degree=tp)
    files = sorted((out / "checkpoint").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    cores.staging = cores.Staging()
    loaded = NeuronOPTForCausalLM.from_pretrained(out)
    placed = sum(t.nbytes for tensors in loaded.runtime.model.nxd_model.weights for t in tensors.values())
    assert 0 < cores.staging.peak <= files[-1].stat().st_size
    assert cores.staging.peak < placed / 3
    print(
        f"{cores.staging.peak} bytes staged of {placed} placed on {tp} ranks; largest file {files[-1].stat().st_size}"
    )


def test_compile_cache_and_environment(tmp_path, monkeypatch):
    """The registry of the compile cache gets an entry for a model of the hub; the environment is as it was."""
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("BASE_COMPILE_WORK_DIR", str(tmp_path / "work"))
    config = OPTNeuronConfig(**OPTIONS, instance_type="trn2", tp_degree=4, checkpoint_id="org/tiny")
    tiny_opt().save_pretrained(tmp_path / "source")
    NeuronOPTForCausalLM.export(tmp_path / "source", config).save_pretrained(tmp_path / "out")
    assert "NEURON_PLATFORM_TARGET_OVERRIDE" not in os.environ and os.environ["LOCAL_WORLD_SIZE"] == "7"
    entries = [json.loads(file.read_text()) for file in (tmp_path / "compile-cache").rglob("*.json")]
    assert any(entry.get("neuron", {}).get("_serialized_key") == "OPTNeuronConfig" for entry in entries)
    assert (tmp_path / "work" / "graphs").is_dir()
    manifest = json.loads((tmp_path / "out" / "compiled" / "manifest.json").read_text())
    assert manifest["versions"] == double.VERSIONS
    arguments = manifest["compiler_arguments"]
    assert all("--lnc=2 --target trn2" in text for text in arguments.values())
    assert "-O1" in arguments["context_encoding"] and "-O2" in arguments["token_generation"]


def test_command_auto_class_and_pipeline_reach_it(tmp_path, monkeypatch):
    import fake_sdk
    from optimum.commands import optimum_cli
    from small_models import SHIPPED_MODEL

    fake_sdk.PACKAGES.add("sentence_transformers")  # which optimum.neuron.pipeline imports, for another task
    from optimum.neuron import NeuronModelForCausalLM
    from optimum.neuron.pipelines.transformers.base import pipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = "--instance_type inf2 --tensor_parallel_size 2 --batch_size 2 --sequence_length 32 --auto_cast_type fp32"
    buckets = "--prompt_buckets 32 --cache_buckets 32"
    command = f"optimum-cli export neuron -m {SHIPPED_MODEL} {options} {buckets} {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", command.split())
    optimum_cli.main()
    loaded = NeuronModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(loaded).__name__, type(loaded.runtime).__name__) == ("NeuronOPTForCausalLM", "NeuronRuntime")
    cpu = NeuronOPTForCausalLM.from_pretrained(
        SHIPPED_MODEL, instance_type="cpu", batch_size=2, sequence_length=32, amp="f32", eager=True
    )
    pipe = pipeline("text-generation", str(tmp_path / "out"))
    results = pipe(["It was", "Mr."], max_new_tokens=6, do_sample=False)
    inputs = pipe.tokenizer(["It was", "Mr."], return_tensors="pt", padding=True, padding_side="left")
    tokens = cpu.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = pipe.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert [result[0]["generated_text"] for result in results] == expected


def test_an_instance_is_exported_for_by_default(tmp_path, monkeypatch):
    from optimum_opt_trn import modeling_neuron_opt

    tiny_opt().save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_neuron_opt, "get_neuron_major", lambda: 1)
    monkeypatch.setattr(modeling_neuron_opt, "get_instance_name", lambda: "inf2.24xlarge\n")
    monkeypatch.setattr(modeling_neuron_opt, "get_available_cores", lambda: 4)
    config = NeuronOPTForCausalLM.get_neuron_config(tmp_path, sequence_length=48)
    assert (config.instance_type, config.target, config.tp_degree) == ("inf2", "trn1", 4)


def test_a_prompt_for_one_slot_touches_no_other(tmp_path):
    """Every other position of every cache on every rank, and the graph that runs."""
    from optimum_opt_trn.model.sampling import SamplingInputs
    from optimum_opt_trn.targets.base import Step

    runtime = NeuronOPTForCausalLM.from_pretrained(export(tmp_path, tiny_opt(), amp="f32", tp_degree=2)).runtime
    states = [cache for rank in runtime.model.nxd_model.state for cache in rank.values()]
    for cache in states:
        cache.fill_(7.0)
    called = []
    model = runtime.model
    runtime.model = lambda *inputs: called.append(tuple(inputs[0].shape)) or model(*inputs)
    length, slot = 11, 1
    tokens = torch.randint(4, 128, (length,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    places = torch.arange(length)
    step = Step(tokens, torch.full_like(places, slot), places, places[-1:], SamplingInputs.greedy(1))
    result = runtime.step(step)
    assert called == [(1, 16)]
    reference = rounded(tiny_opt(), torch.float32)(tokens[None].long()).logits[0, -1]
    assert (result.logits[0] - reference).abs().max() < 1e-3 * reference.std()
    assert result.tokens.tolist() == [int(reference.argmax())]
    for cache in [cache for rank in model.nxd_model.state for cache in rank.values()]:
        assert (cache[[0, 2]] == 7).all() and (cache[slot, :, 16:] == 7).all()
        assert not (cache[slot, :, :length] == 7).any()


@pytest.mark.parametrize(
    ("tp", "copies"),
    [
        (1, [[1, 1], [0, 0]]),
        # One source for several slots, two sources, none.
        (2, [[1, 1, 2, 1, 4], [3, 1, 1, 3, 4], [0, 1, 2, 3, 4]]),
    ],
    ids=["two slots", "five slots"],
)
def test_copied_slots(tp, copies, tmp_path):
    """Every cache of every rank, compared with indexing."""
    batch, length = len(copies[0]), 17
    buckets = {"prompt_buckets": (SEQUENCE,), "cache_buckets": (SEQUENCE,)}
    out = export(tmp_path, tiny_opt(), amp="f32", tp_degree=tp, batch_size=batch, **buckets)
    runtime = NeuronOPTForCausalLM.from_pretrained(out).runtime
    generator = torch.Generator().manual_seed(4)

    def caches() -> list[torch.Tensor]:
        return [cache for rank in runtime.model.nxd_model.state for cache in rank.values()]

    for cache in caches():
        cache.normal_(generator=generator)
    for sources in map(torch.tensor, copies):
        before = [cache.clone() for cache in caches()]
        runtime.copy(sources.to(torch.int32), length)
        kept = sources == torch.arange(batch)
        for cache, old in zip(caches(), before, strict=True):
            assert torch.equal(cache[:, :, :length], old[sources, :, :length])
            assert torch.equal(cache[kept], old[kept])


@pytest.mark.parametrize("switch", ["attention_after_write", "all_reduce_f32", "topk_whole_vocabulary"])
def test_switches_of_the_example_compute_the_same(switch, tmp_path):
    from neuron_switches import switched

    model = tiny_opt(vocab_size=203, num_hidden_layers=1)
    prompts = ragged(model.config.vocab_size)
    with switched(switch):
        out = export(tmp_path, model, amp="f32", tp_degree=2)
    loaded = NeuronOPTForCausalLM.from_pretrained(out)
    reference = rounded(model, torch.float32)
    assert loaded.generate(**prompts, **GREEDY).tolist() == reference.generate(**prompts, **GREEDY).tolist()
    # And calls of several tokens after a cached prefix.
    past = loaded(prompts["input_ids"][:, :17], attention_mask=prompts["attention_mask"][:, :17]).past_key_values
    mask, rest = prompts["attention_mask"], prompts["input_ids"][:, 17:]
    logits = loaded(rest, attention_mask=mask, past_key_values=past).logits[1]
    expected = reference(prompts["input_ids"], attention_mask=mask).logits[1, 17:]
    assert (logits - expected).abs().max() < 1e-3 * expected.std()


def test_the_example_measures_a_switch(tmp_path, monkeypatch):
    import argparse

    import validate_on_trn

    monkeypatch.setattr(validate_on_trn, "TIMED_STEPS", 4)
    found = NeuronOPTForCausalLM.get_neuron_config
    monkeypatch.setattr(
        NeuronOPTForCausalLM, "get_neuron_config", lambda name, **options: found(name, **{**options, **on_trn1})
    )
    on_trn1, model = {"instance_type": "trn1"}, Path(validate_on_trn.__file__).parent / "models" / "opt-austen"
    options = argparse.Namespace(
        output=tmp_path, cpu=False, batch_size=1, sequence_length=64, tensor_parallel_size=2, auto_cast_type="f16",
        weight_dtype=None, switches=["all_reduce_f32"],
    )  # fmt: skip
    measured = validate_on_trn.switches(str(model), options, {"export": {"seconds": 1.0}})
    values = measured["all_reduce_f32"]
    assert "error" not in values, values["traceback"]
    assert values["passed"] and values["prefill_ms"] > 0 and values["decode_ms"] > 0
    own, other = validate_on_trn.comparison(measured)[2:]
    assert own.startswith("| none | 1 | ") and other.startswith("| all_reduce_f32 | ")
    assert other.count("|") == 6 and "|  |" not in other


def test_one_module_is_in_memory_at_a_time(tmp_path, monkeypatch):
    import weakref

    from optimum_opt_trn.targets.neuron import builder

    alive: list[weakref.ref] = []
    most = 0
    original = builder.RankModule.__init__

    def counted(self, *arguments):
        nonlocal most
        most = max(most, 1 + sum(module() is not None for module in alive))
        original(self, *arguments)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(builder.RankModule, "__init__", counted)
    export(tmp_path, tiny_opt(), tp_degree=2)
    assert len(alive) == 4 and most == 1


class TestOneProcess:
    """What the runtime lets a process do."""

    @pytest.fixture(scope="class")
    def exports(self, tmp_path_factory):
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path_factory.mktemp("cache")))
        root = tmp_path_factory.mktemp("exports")
        yield {tp: export(root, tiny_opt(), f"tp{tp}", amp="f32", tp_degree=tp) for tp in (1, 2)}
        monkeypatch.undo()

    def test_models_of_one_degree_follow_one_another(self, exports):
        tokens = []
        for _ in range(2):
            model = NeuronOPTForCausalLM.from_pretrained(exports[2])
            tokens.append(model.generate(**ragged(128), **GREEDY).tolist())
        assert tokens[0] == tokens[1]

    def test_a_model_of_another_degree(self, exports):
        NeuronOPTForCausalLM.from_pretrained(exports[2])
        with pytest.raises(TargetError, match="loaded a model with tp_degree=2.*tp_degree=1, in another process"):
            NeuronOPTForCausalLM.from_pretrained(exports[1])
        NeuronOPTForCausalLM.from_pretrained(exports[1], eager=True)

    def test_a_fork(self, exports):
        """In the child both a step and a load end at once, and say why."""
        model = NeuronOPTForCausalLM.from_pretrained(exports[2])
        child = os.fork()
        if not child:
            status = 1
            try:
                for use in (
                    lambda: model.generate(**ragged(128), **GREEDY),
                    lambda: NeuronOPTForCausalLM.from_pretrained(exports[2]),
                ):
                    with pytest.raises(TargetError, match="is a fork of one.*spawn"):
                        use()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        model.generate(**ragged(128), **GREEDY)


@pytest.mark.parametrize(
    ("visible", "number", "cores"),
    [
        (None, None, 8), ("0,1", None, 2), ("3-5,6", None, 4), ("7", None, 1), ("0-3", "1", 4), (" 1 , 2-3 ", None, 3),
        ("2-4,3", None, 3), ("", "2", 2), (None, "99", 8),
    ],
)  # fmt: skip
def test_lists_of_cores(monkeypatch, visible, number, cores):
    for name, value in zip(host.CORE_VARIABLES, (visible, number), strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert host.available_cores() == cores


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *(("NEURON_RT_VISIBLE_CORES", text, f"={text}: it takes cores and ranges") for text in ("a", "3-1", "1,,2")),
        ("NEURON_RT_VISIBLE_CORES", "6-8", "=6-8: this host has the NeuronCores 0 to 7"),
        ("NEURON_RT_NUM_CORES", "two", "=two: it takes a number"),
    ],
)
def test_core_variables_that_cannot_be_read(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(TargetError, match=words):
        host.available_cores()


class TestErrors:
    @pytest.fixture(scope="class")
    def exported(self, tmp_path_factory):
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path_factory.mktemp("cache")))
        yield export(tmp_path_factory.mktemp("exported"), tiny_opt(), amp="f16", tp_degree=2)
        monkeypatch.undo()

    @pytest.fixture
    def copy(self, exported, tmp_path):
        shutil.copytree(exported, tmp_path / "copy")
        return tmp_path / "copy"

    @pytest.mark.parametrize(
        ("family", "count", "words"),
        [
            ("trn1", 0, "no Neuron device.*eager=True"),
            ("trn2", 8, "this is a trn2"),
            ("trn1", 1, "has 1 NeuronCores .*NEURON_RT_NUM_CORES=1.*0-1.*tp_degree=1"),
        ],
    )
    def test_host(self, exported, monkeypatch, family, count, words):
        Host(monkeypatch, family, count)
        monkeypatch.setenv("NEURON_RT_NUM_CORES", "1")
        with pytest.raises(TargetError, match=words):
            NeuronOPTForCausalLM.from_pretrained(exported)
        NeuronOPTForCausalLM.from_pretrained(exported, eager=True)

    def test_compiler_version(self, copy):
        manifest = json.loads((copy / "compiled" / "manifest.json").read_text())
        manifest["versions"]["neuronxcc"] = "2.0"
        (copy / "compiled" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(TargetError, match="neuronxcc 2.0 .here 2.21.18209.*Export it again"):
            NeuronOPTForCausalLM.from_pretrained(copy)

    def test_other_shapes(self, copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        with pytest.raises(TargetError, match="compiled for other shapes"):
            NeuronOPTForCausalLM.from_pretrained(copy)

    def test_not_compiled(self, tmp_path):
        out = export(tmp_path, tiny_opt(), eager=True)
        with pytest.raises(TargetError, match="exported without compilation.*eager=True"):
            NeuronOPTForCausalLM.from_pretrained(out)

    @pytest.mark.parametrize("file", ["model.pt", "manifest.json"])
    @pytest.mark.parametrize("broken", [True, False])
    def test_files(self, copy, file, broken):
        if broken:
            (copy / "compiled" / file).write_bytes(b"{}")
        else:
            (copy / "compiled" / file).unlink()
        with pytest.raises(CheckpointError, match=file):
            NeuronOPTForCausalLM.from_pretrained(copy)

    def test_busy_cores(self, exported, monkeypatch):
        def busy(checkpoint):
            raise RuntimeError("NEURONCORE_NOT_AVAILABLE")

        monkeypatch.setattr(torch.ops.neuron, "_parallel_load", busy)
        with pytest.raises(TargetError, match="NEURONCORE_NOT_AVAILABLE.*neuron-ls.*NEURON_RT_VISIBLE_CORES"):
            NeuronOPTForCausalLM.from_pretrained(exported)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda rank, name: rank.pop(name), "rank 1: there is no weight layer_1__fc1__weight"),
            (
                lambda rank, name: rank.update({name: rank[name][:7]}),
                "layer_1__fc1__weight has another shape or dtype",
            ),
            (lambda rank, name: rank.update({name: rank[name].float()}), "fc1__weight has another shape or dtype"),
        ],
    )
    def test_weights_of_a_rank(self, exported, monkeypatch, change, words):
        place = torch.ops.neuron._parallel_load

        def spoil(checkpoint):
            if "layer_1__fc1__weight" in checkpoint[1]:
                change(checkpoint[1], "layer_1__fc1__weight")
            return place(checkpoint)

        monkeypatch.setattr(torch.ops.neuron, "_parallel_load", spoil)
        with pytest.raises(TargetError, match=words):
            NeuronOPTForCausalLM.from_pretrained(exported)

    def test_calls_that_no_graph_serves(self, exported):
        runtime = NeuronOPTForCausalLM.from_pretrained(exported).runtime
        inputs = [torch.zeros(3, dtype=torch.int32)] * 2 + [torch.zeros(5, dtype=torch.int32)]
        sampling = [torch.ones(3, 4), torch.zeros(3), torch.full((3, 8), -1, dtype=torch.int32)]
        with pytest.raises(Exception, match="Input shape"):
            runtime.model(*inputs, *sampling)
        with pytest.raises(RuntimeError, match="argument"):
            runtime.model(*inputs, *sampling, torch.zeros(1))
        inputs[2] = torch.zeros(24, dtype=torch.int32)
        with pytest.raises(Exception, match="another dtype"):
            runtime.model(inputs[0].long(), *inputs[1:], *sampling)
        runtime.model(*inputs, *sampling)

    def test_degree_that_the_family_does_not_connect(self, tmp_path):
        with pytest.raises(TargetError, match="tp_degree=4: trn1 connects 1, 2, 8, 32"):
            export(tmp_path, tiny_opt(), instance_type="trn1", tp_degree=4)

    def test_compilation_fails(self, tmp_path, monkeypatch):
        from double.model_builder import ModelBuilder

        def trace(self, initialize_model_weights=True):
            raise RuntimeError("NCC_ABCD")

        monkeypatch.setattr(ModelBuilder, "trace", trace)
        with pytest.raises(TargetError, match="inf2 .NCC_ABCD.*BASE_COMPILE_WORK_DIR"):
            export(tmp_path, tiny_opt())
        assert not (tmp_path / "export").exists()


def test_graph_key_tells_what_graphs_depend_on():
    config, options = tiny_config(), {"batch_size": 2, "sequence_length": 64, "instance_type": "trn1"}
    keys = {
        "same": _graph_key(tiny_config(), OPTNeuronConfig(**options)),
        # A checkpoint's name is only a name.
        "name": _graph_key(config, OPTNeuronConfig(**options, checkpoint_id="a/b", checkpoint_revision="0")),
        "adapter": _graph_key(config, OPTNeuronConfig(**options, adapter="a/lora")),
    }
    assert set(keys.values()) == {_graph_key(config, OPTNeuronConfig(**options))}
    assert keys["same"] != _graph_key(config, OPTNeuronConfig(**{**options, "instance_type": "trn2"}))
    others = [
        *(_graph_key(config, OPTNeuronConfig(**{**options, **change})) for change in (
            {"batch_size": 3}, {"sequence_length": 65}, {"tp_degree": 2}, {"amp": "bf16"}, {"kv_cache_dtype": "f32"},
            {"max_topk": 5}, {"prompt_embeddings": True}, {"weight_dtype": "int8"},
        )),
        *(_graph_key(tiny_config(**change), OPTNeuronConfig(**options)) for change in (
            {"vocab_size": 127}, {"num_hidden_layers": 9}, {"max_position_embeddings": 99},
            {"ffn_dim": 92}, {"num_attention_heads": 2}, {"word_embed_proj_dim": 32},
            {"hidden_size": 128, "num_attention_heads": 8}, {"do_layer_norm_before": False}, {"enable_bias": False},
            {"layer_norm_elementwise_affine": False}, {"activation_function": "gelu"}, {"tie_word_embeddings": False},
            {"_remove_final_layer_norm": True},
        )),
        *(_graph_key(tiny_config(tie_word_embeddings=tied, quantization_config=quantization_config(head=False)),
                     OPTNeuronConfig(**options, weight_dtype="int8")) for tied in (False, True)),
    ]  # fmt: skip
    assert len({*keys.values(), *others}) == 1 + len(others)
    # The head becomes int8, untied: a source and its export, whether the source was tied or not.
    made = tiny_config(tie_word_embeddings=False, quantization_config=quantization_config())
    int8 = OPTNeuronConfig(**options, weight_dtype="int8")
    sources = (config, tiny_config(tie_word_embeddings=False), made)
    assert len({_graph_key(source, int8) for source in sources}) == 1


@pytest.mark.parametrize("tp", [1, 2])
def test_continuous_batching(tp, tmp_path):
    """Prompts one by one into slots of a running batch, common beginnings copied, cancelled neighbours."""
    model = tiny_opt()
    reference = rounded(model, torch.float32)
    loaded = NeuronOPTForCausalLM.from_pretrained(export(tmp_path, model, amp="f32", tp_degree=tp))
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 30, 1, 14, 20, 3, 9]
    prompts = [torch.randint(4, 128, (length,), generator=generator).tolist() for length in lengths]
    prompts += [prompts[1][:20] + [9, 8, 7], prompts[1][:25]]
    expected = [reference.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist() for prompt in prompts]
    results = loaded.generate_batch(prompts, progress_bar=False, **GREEDY)
    assert [one.generated_tokens for one in results.values()] == expected
    with loaded.init_continuous_batching() as manager:
        names = manager.add_requests([prompts[1], prompts[0], *prompts[::-1]], **GREEDY)
        manager.cancel_request(names[1])
        outputs = [manager.get_result(name) for name in names]
    assert [one.generated_tokens for one in outputs[2:]] == expected[::-1]
    assert manager.statistics().prefix_hits > 0
    # Steps of a prompt are whole: the graph of a prompt takes it at once.
    assert loaded.runtime.prompt_chunk is None
