"""Reading shards: views of mapped files that together equal the whole tensor; files that do not fit are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import KINDS, tiny_config, tiny_opt
from torch import Tensor

from optimum_opt_trn import CheckpointError, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.checkpoint import ModelWeights, load_weights
from optimum_opt_trn.checkpoint.config import load_config
from optimum_opt_trn.checkpoint.layout import INDEX_NAME, OUTER_FILE
from optimum_opt_trn.model.parallel import RankGroup, Weights


DEGREES = [1, 2, 4]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: save_pretrained_split(tiny_opt(**options), root / kind) for kind, options in KINDS.items()}


@pytest.fixture
def broken(checkpoints, tmp_path) -> Path:
    """A copy of a checkpoint, to damage."""
    return Path(shutil.copytree(checkpoints["pre_norm"], tmp_path / "broken"))


def load(directory: Path, config=None, tp_degree: int = 1, ranks=None, amp: str = "f16") -> ModelWeights:
    neuron_config = OPTNeuronConfig(sequence_length=64, tp_degree=tp_degree, amp=amp)
    group = RankGroup(tp_degree, tuple(range(tp_degree) if ranks is None else ranks))
    return load_weights(directory, config or tiny_config(), neuron_config, group)


def parts(weights: ModelWeights) -> dict[str, Weights]:
    layers = {f"model.decoder.layers.{i}.": layer for i, layer in enumerate(weights.layers)}
    return {"embed": weights.embed, "head": weights.head, **layers}


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def mapped_file(tensor: Tensor) -> str | None:
    """The file that is mapped at the tensor's address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < stop:
            return path if path.startswith("/") else None
    return None


@pytest.mark.parametrize("tp_degree", DEGREES)
@pytest.mark.parametrize("kind", KINDS)
def test_shards_together_are_the_stored_tensors(kind, tp_degree, checkpoints):
    config = tiny_config(**KINDS[kind])
    stored = stored_tensors(checkpoints[kind])
    stored.setdefault("lm_head.weight", stored["model.decoder.embed_tokens.weight"])
    column = ("q_proj", "k_proj", "v_proj", "fc1", "lm_head", "embed_tokens")
    seen = set()
    for prefix, weights in parts(load(checkpoints[kind], config, tp_degree)).items():
        for name, shards in weights.items():
            full = name if name == "lm_head.weight" else ("" if "." in prefix else "model.decoder.") + name
            full = prefix + full if "." in prefix else full
            whole = stored[full]
            seen.add(full)
            module, part = name.split(".")[-2:]
            if module in column:
                padded = torch.cat(shards)
                joined, padding = padded[: len(whole)], padded[len(whole) :]
                assert not padding.any() and len(padding) < tp_degree
            elif module in ("out_proj", "fc2") and part == "weight":
                joined = torch.cat(shards, dim=1)
            else:
                assert len(shards) == 1
                joined = shards[0]
            assert joined.dtype == whole.dtype
            assert torch.equal(joined, whole), name
            assert len({tuple(shard.shape) for shard in shards}) == 1
    assert seen == set(stored)


@pytest.mark.parametrize("tp_degree", [2, 4])
def test_one_rank_of_many_gets_its_own_shards(tp_degree, checkpoints):
    config = tiny_config(**KINDS["odd_vocabulary"])
    everything = parts(load(checkpoints["odd_vocabulary"], config, tp_degree))
    for rank in range(tp_degree):
        loaded = load(checkpoints["odd_vocabulary"], config, tp_degree, ranks=[rank])
        assert loaded.ranks.tolist() == [rank] and loaded.ranks.dtype == torch.int32
        for part, weights in parts(loaded).items():
            for name, shards in weights.items():
                assert len(shards) == 1
                expected = everything[part][name]
                assert torch.equal(shards[0], expected[rank if len(expected) > 1 else 0])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell its maps")
@pytest.mark.parametrize("tp_degree", DEGREES)
@pytest.mark.parametrize("kind", ["post_norm", "odd_vocabulary"])
def test_nothing_is_copied_but_a_padded_vocabulary(kind, tp_degree, checkpoints):
    config = tiny_config(**KINDS[kind])
    weights = load(checkpoints[kind], config, tp_degree)
    padded = config.vocab_size % tp_degree != 0
    for prefix, part in parts(weights).items():
        for name, shards in part.items():
            assert len({shard.untyped_storage().data_ptr() for shard in shards}) == 1 or padded
            for rank, shard in enumerate(shards):
                if padded and name in ("embed_tokens.weight", "lm_head.weight") and rank == tp_degree - 1:
                    assert mapped_file(shard) is None
                else:
                    expected = f"layer_{int(prefix.split('.')[3]):03d}.safetensors" if "." in prefix else OUTER_FILE
                    assert mapped_file(shard) == str(checkpoints[kind] / expected), (prefix, name)


def test_tied_head_shares_its_memory(checkpoints):
    tied = load(checkpoints["pre_norm"], tp_degree=2)
    for head, embedding in zip(tied.head["lm_head.weight"], tied.embed["embed_tokens.weight"], strict=True):
        assert head.data_ptr() == embedding.data_ptr()
    untied = load(checkpoints["untied"], tiny_config(**KINDS["untied"]), tp_degree=2)
    assert not torch.equal(untied.head["lm_head.weight"][0], untied.embed["embed_tokens.weight"][0])


@pytest.mark.parametrize("tp_degree", DEGREES)
def test_an_int8_head_is_cut_with_its_scales(tp_degree, tmp_path):
    save_pretrained_split(tiny_opt(vocab_size=203), tmp_path, "f16", weight_dtype="int8")
    group = RankGroup(tp_degree, tuple(range(tp_degree)))
    neuron_config = OPTNeuronConfig(tp_degree=tp_degree, sequence_length=64, weight_dtype="int8")
    loaded, stored = load_weights(tmp_path, load_config(tmp_path), neuron_config, group), stored_tensors(tmp_path)
    for name, dtype in (("lm_head.weight", torch.int8), ("lm_head.weight_scale", torch.float32)):
        whole = torch.cat(loaded.head[name])
        assert whole.dtype == dtype and torch.equal(whole[:203], stored[name]) and not whole[203:].any()
        assert {len(shard) for shard in loaded.head[name]} == {-(-203 // tp_degree)}
    assert loaded.embed["embed_tokens.weight"][0].dtype == torch.float16


def test_row_parallel_shards_are_columns_in_place(checkpoints):
    weights = load(checkpoints["pre_norm"], tp_degree=4).layers[0]
    for name, inputs in (("fc2.weight", 96), ("self_attn.out_proj.weight", 64)):
        first, second = weights[name][:2]
        assert first.stride() == (inputs, 1)
        assert second.data_ptr() - first.data_ptr() == inputs // 4 * first.element_size()


@pytest.mark.parametrize("name", [OUTER_FILE, "layer_000.safetensors", "layer_001.safetensors", INDEX_NAME])
def test_missing_file(name, broken):
    (broken / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load(broken)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_truncated_file(broken, checkpoints, data):
    name = data.draw(st.sampled_from([OUTER_FILE, "layer_001.safetensors"]))
    content = (checkpoints["pre_norm"] / name).read_bytes()
    length = data.draw(st.integers(0, 2000) | st.integers(0, len(content) - 1) | st.just(len(content) - 1))
    (broken / name).write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=f"{name} is truncated or broken.*Export the model again"):
        load(broken)
    (broken / name).write_bytes(content)
    load(broken)


def test_missing_and_extra_tensors(broken):
    file = broken / "layer_001.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "more": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="layer_001.safetensors also holds more: .*config.json"):
        load(broken)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("fc1.bias")}, file)
    with pytest.raises(CheckpointError, match="layer_001.safetensors lacks model.decoder.layers.1.fc1.bias"):
        load(broken)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.float(),
        lambda t: t.bfloat16(),
        lambda t: t[:-1].clone(),
        lambda t: t.T.contiguous(),
        lambda t: t.flatten().clone(),
    ],
)
def test_tensor_of_another_shape_or_dtype(change, broken):
    file, name = broken / "layer_001.safetensors", "model.decoder.layers.1.fc1.weight"
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name])}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is .*configuration makes it torch.float16 \(96, 64\)"):
        load(broken)


def test_checkpoint_of_another_amp_or_model(broken):
    with pytest.raises(CheckpointError, match="is torch.float16 .*makes it torch.bfloat16"):
        load(broken, amp="bf16")
    with pytest.raises(CheckpointError, match="lacks model.decoder.project_in.weight"):
        load(broken, tiny_config(word_embed_proj_dim=32))
    with pytest.raises(CheckpointError, match="lacks layer_002.safetensors"):
        load(broken, tiny_config(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"makes it torch.float16 \(129, 64\)"):
        load(broken, tiny_config(vocab_size=129))


def test_not_a_split_checkpoint(tmp_path):
    tiny_opt().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"lacks {INDEX_NAME}: it is not a split checkpoint"):
        load(tmp_path)
