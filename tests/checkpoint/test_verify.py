"""Verification finds what is wrong, and names the file."""

import json
import re
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import KINDS, SHIPPED_MODEL, tiny_config, tiny_opt
from transformers import AutoTokenizer

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig, pipeline, save_pretrained_split
from optimum_opt_trn.checkpoint import verify_checkpoint
from optimum_opt_trn.checkpoint.layout import TensorSpec
from optimum_opt_trn.checkpoint.stream import write_tensors
from optimum_opt_trn.checkpoint.verify import find_problems, find_unlisted
from optimum_opt_trn.dtypes import normalize_dtype
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
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is written anew
    tensors[FC1] = change(tensors[FC1]).contiguous()
    specs = {name: TensorSpec(tuple(tensor.shape), normalize_dtype(tensor.dtype)) for name, tensor in tensors.items()}
    write_tensors(file, specs, lambda name: iter([tensors[name]]), lambda _: None)


def drop_from_manifest(broken: Path) -> None:
    (broken / "split_manifest.json").unlink()


def as_earlier_version(directory: Path) -> None:
    """Turns the manifest into one of an earlier version: hashes of the weights only."""
    file = directory / "split_manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: content[name] for name in ("format", "amp", "files")}, indent=2) + "\n")


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
def test_damage_is_found_and_named_in_checkpoints_of_earlier_versions(damage, file, words, broken):
    as_earlier_version(broken)
    assert find_problems(broken) == []
    damage(broken)
    with pytest.raises(CheckpointError, match=words) as error:
        verify_checkpoint(broken)
    assert (str(broken) if file is str else file) in str(error.value)


@pytest.fixture(scope="module")
def whole_export(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    tiny_opt().save_pretrained(source)
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(source)
    return export_opt(source, tmp_path_factory.mktemp("exports") / "whole", OPTNeuronConfig(sequence_length=64))


def files_of(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("what", ["split checkpoint", "export"])
def test_every_file_deleted_or_with_one_byte_flipped_is_named(what, whole, whole_export, tmp_path):
    """Every file in turn, manifests included; also from_pretrained(verify=True), which must not load."""
    original = whole if what == "split checkpoint" else whole_export
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    names = files_of(original)
    assert len(names) >= {"split checkpoint": 7, "export": 15}[what], names
    random = Random(0)
    for name in names:
        content = (original / name).read_bytes()
        position = random.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] ^= 1 << random.randrange(8)
        for damaged in (None, bytes(flipped), content[:position], content + b" "):
            if damaged is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(damaged)
            problems = find_problems(copy)
            assert any(str(copy / name) in problem for problem in problems), (name, position, problems)
            if what == "export" and damaged is not None:
                with pytest.raises((ValueError, OSError), match=re.escape(name.name)):
                    NeuronOPTForCausalLM.from_pretrained(copy, verify=True)
        (copy / name).write_bytes(content)
    assert find_problems(copy) == []


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_of_any_file_of_an_export_is_named(whole_export, tmp_path_factory, data):
    copy = Path(shutil.copytree(whole_export, tmp_path_factory.mktemp("copy") / "copy"))
    name = data.draw(st.sampled_from(files_of(whole_export)))
    content = bytearray((copy / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (copy / name).write_bytes(content)
    assert any(str(copy / name) in problem for problem in find_problems(copy))
    shutil.rmtree(copy.parent)


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint/model.safetensors", "compiled/kernels.so", "a/b/c.json"])
def test_files_too_many_are_named(name, whole_export, tmp_path):
    copy = Path(shutil.copytree(whole_export, tmp_path / "copy"))
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"x")
    assert [str(copy / name) in problem and "no part of" in problem for problem in find_problems(copy)] == [True]
    with pytest.raises(CheckpointError, match=re.escape(name)):
        NeuronOPTForCausalLM.from_pretrained(copy, verify=True)


def test_what_the_hub_adds_is_not_looked_at(whole_export, tmp_path):
    copy = Path(shutil.copytree(whole_export, tmp_path / "copy"))
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    for name in (".gitattributes", ".cache/huggingface/a.lock", "README.md"):
        (copy / name).write_text("of the hub")
    assert find_problems(copy) == []


def test_an_export_of_an_earlier_version_says_what_was_not_compared(whole_export, tmp_path, caplog):
    copy = Path(shutil.copytree(whole_export, tmp_path / "copy"))
    assert find_unlisted(copy) == []
    (copy / "export_manifest.json").unlink()
    assert "export_manifest.json is missing" in find_problems(copy)[0]
    as_earlier_version(copy / "checkpoint")
    assert find_problems(copy) == []
    weights = [name for name in files_of(copy) if name.parent.name == "checkpoint" and name.suffix == ".safetensors"]
    unlisted = {str(name) for name in files_of(copy)} - {*map(str, weights), "checkpoint/split_manifest.json"}
    assert set(find_unlisted(copy)) == unlisted and {"config.json", "compiled/manifest.json"} < unlisted
    NeuronOPTForCausalLM.from_pretrained(copy, verify=True)
    assert any("config.json" in r.getMessage() and "not verified" in r.getMessage() for r in caplog.records)
    (copy / weights[0]).write_bytes(b"")
    assert str(copy / weights[0]) in find_problems(copy)[0]


def test_what_is_saved_again_is_recorded(whole_export, tmp_path):
    """By model.save_pretrained, to another directory and in place, and by a pipeline's."""
    model = NeuronOPTForCausalLM.from_pretrained(whole_export)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "saved")
    assert find_problems(tmp_path / "saved") == []
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    saved = NeuronOPTForCausalLM.from_pretrained(tmp_path / "saved")
    saved.generation_config.max_new_tokens = 8
    saved.save_pretrained(tmp_path / "saved")
    assert ["notes.txt" in problem for problem in find_problems(tmp_path / "saved")] == [True]
    pipeline(model=str(whole_export)).save_pretrained(tmp_path / "piped")
    assert find_problems(tmp_path / "piped") == []


def test_splitting_again_records_what_an_earlier_version_did_not(broken):
    as_earlier_version(broken)
    assert "config.json" in find_unlisted(broken)
    kept = (broken / LAYER).stat()
    save_pretrained_split(tiny_opt(), broken)
    assert find_unlisted(broken) == find_problems(broken) == []
    assert (broken / LAYER).stat().st_mtime_ns == kept.st_mtime_ns


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
