"""Verification finds what is wrong, and names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import KINDS, tiny_config, tiny_opt

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.checkpoint import verify_checkpoint
from optimum_opt_trn.checkpoint.verify import find_problems
from optimum_opt_trn.export import export_opt


LAYER, FC1 = "layer_001.safetensors", "model.decoder.layers.1.fc1.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_pretrained_split(tiny_opt(), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def broken(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "broken"))


@pytest.mark.parametrize("amp", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_whole(kind, amp, tmp_path):
    verify_checkpoint(save_pretrained_split(tiny_opt(**KINDS[kind]), tmp_path, amp))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_flipped_bit_and_every_length_is_found(whole, broken, data):
    name = data.draw(st.sampled_from(["embeddings_and_head.safetensors", "layer_000.safetensors", LAYER]))
    content = bytearray((whole / name).read_bytes())
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, 2000) | st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    (broken / name).write_bytes(content)
    problems = find_problems(broken)
    assert problems and all(str(broken / name) in problem for problem in problems), problems
    (broken / name).write_bytes((whole / name).read_bytes())


def change_tensor(file: Path, change) -> None:
    tensors = load_file(file)
    save_file({**tensors, FC1: change(tensors[FC1])}, file, metadata={"format": "pt"})


def drop_from_manifest(broken: Path) -> None:
    (broken / "split_manifest.json").unlink()


DAMAGE = {
    "missing file": (lambda d: (d / LAYER).unlink(), LAYER, "is missing"),
    "missing index": (lambda d: (d / "model.safetensors.index.json").unlink(), "index.json", "is missing"),
    "broken index": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "index.json", "is broken"),
    "index without a tensor": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "index.json", "does not name",
    ),
    "missing manifest": (drop_from_manifest, "split_manifest.json", "is missing"),
    "broken manifest": (lambda d: (d / "split_manifest.json").write_text("[]"), "split_manifest.json", "is broken"),
    "file too many": (
        lambda d: shutil.copy(d / LAYER, d / "layer_002.safetensors"), "layer_002.safetensors", "no part",
    ),
    "missing config": (lambda d: (d / "config.json").unlink(), str, "has no config.json"),
    "another config": (lambda d: tiny_config(ffn_dim=95).save_pretrained(d), "layer_000", r"makes it .*\(95, 64\)"),
    "other values": (lambda d: change_tensor(d / LAYER, lambda t: t + 1), LAYER, "has changed since it was written"),
    "other shape": (lambda d: change_tensor(d / LAYER, lambda t: t.T.contiguous()), LAYER, r"\(64, 96\)"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "file", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(damage, file, words, broken):
    damage(broken)
    with pytest.raises(CheckpointError, match=words) as error:
        verify_checkpoint(broken)
    assert (str(broken) if file is str else file) in str(error.value)


def test_without_hashes_there_is_more_to_look_at(broken):
    change_tensor(broken / LAYER, lambda t: t.index_fill(0, torch.tensor([3]), torch.nan))
    drop_from_manifest(broken)
    problems = find_problems(broken)
    assert len(problems) == 2 and f"{FC1} has values that are not finite" in problems[1]


def test_every_damaged_file_is_named(broken):
    for name in ("layer_000.safetensors", LAYER):
        (broken / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(broken)
    assert str(error.value).count("\n- ") == 2


def test_without_contents_sizes_count(broken):
    content = bytearray((broken / LAYER).read_bytes())
    content[-1] ^= 1
    (broken / LAYER).write_bytes(content)
    assert find_problems(broken, contents=False) == [] != find_problems(broken)
    (broken / LAYER).write_bytes(content[:-1])
    assert "is cut off or replaced" in find_problems(broken, contents=False)[0]


def test_splitting_again_mends(broken):
    """By the call that made it: here from a model, whose weights are compared."""
    (broken / LAYER).write_bytes((broken / LAYER).read_bytes()[:-1])
    kept = (broken / "layer_000.safetensors").stat()
    save_pretrained_split(tiny_opt(), broken)
    assert find_problems(broken) == []
    assert (broken / "layer_000.safetensors").stat().st_mtime_ns == kept.st_mtime_ns


def test_loading_can_verify(whole, tmp_path):
    export = export_opt(whole, tmp_path / "export", OPTNeuronConfig(sequence_length=64), eager=True)
    verify_checkpoint(export)
    NeuronOPTForCausalLM.from_pretrained(export, eager=True, verify=True)
    file = export / "checkpoint" / LAYER
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # a hard link: the original stays
    file.write_bytes(content)
    NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    with pytest.raises(CheckpointError, match=rf"{LAYER} has changed since it was written"):
        NeuronOPTForCausalLM.from_pretrained(export, eager=True, verify=True)
    assert find_problems(whole) == []


def test_what_is_no_checkpoint(tmp_path):
    assert "is not a directory" in find_problems(tmp_path / "nowhere")[0]
    (tmp_path / "export" / "checkpoint").mkdir(parents=True)
    assert "has no config.json" in find_problems(tmp_path / "export")[0]
    tiny_opt().save_pretrained(tmp_path / "plain")
    assert "split_manifest.json is missing" in find_problems(tmp_path / "plain")[0]
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "opt"
