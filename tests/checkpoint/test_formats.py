"""Reading weights in every format in which they are found, and refusing files that are none."""

import json
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import KINDS, save_as_pytorch, tiny_config, tiny_opt
from transformers import OPTForCausalLM

from optimum_opt_trn import CheckpointError
from optimum_opt_trn.checkpoint.hub import open_checkpoint
from optimum_opt_trn.checkpoint.layout import checkpoint_files
from optimum_opt_trn.checkpoint.source import WeightSource, open_model
from optimum_opt_trn.checkpoint.write import write_split


FORMS = {
    "safetensors": lambda model, path: model.save_pretrained(path),
    "sharded safetensors": lambda model, path: model.save_pretrained(path, max_shard_size="60KB"),
    "pytorch": lambda model, path: save_as_pytorch(model, path),
    "sharded pytorch": lambda model, path: save_as_pytorch(model, path, 60_000),
}
FC1 = "model.decoder.layers.0.fc1.weight"


def open_directory(directory, config, amp="f32") -> WeightSource:
    """The weights of a model of `config` in a directory, to be read in `amp`."""
    return open_checkpoint(directory, checkpoint_files(config, amp)).weights


def assert_same_tensors(source: WeightSource, model: OPTForCausalLM) -> None:
    """Every tensor of the layout can be read from `source` and has the model's values."""
    state = model.state_dict()
    for specs in checkpoint_files(model.config, "f32").values():
        for name in specs:
            tensor = source.read(name)
            assert tensor.dtype == torch.float32 and tensor.is_contiguous()
            assert torch.equal(tensor, state[name].float()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_directory_in_every_format(form, kind, tmp_path):
    model = tiny_opt(**KINDS[kind])
    FORMS[form](model, tmp_path)
    weights = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]
    assert (len(weights) > 1) == ("sharded" in form)
    assert_same_tensors(open_directory(tmp_path, model.config), model)


def save_old_split(model: OPTForCausalLM, directory) -> None:
    """As transformers-neuronx's save_pretrained_split did: one torch.save for each entry of the state dictionary."""
    files = directory / "pytorch_model.bin"
    files.mkdir(parents=True)
    names = {name: f"p{index}.{name}" for index, name in enumerate(model.state_dict())}
    (files / "key_to_filename.json").write_text(json.dumps(names, indent=2))
    for name, tensor in model.state_dict().items():
        torch.save(tensor, files / names[name])
    model.config.save_pretrained(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_split_format_of_transformers_neuronx(kind, tmp_path):
    model = tiny_opt(**KINDS[kind])
    save_old_split(model, tmp_path)
    assert_same_tensors(open_directory(tmp_path, model.config), model)


def test_faults_of_that_format(tmp_path):
    model = tiny_opt()
    save_old_split(model, tmp_path)
    files = tmp_path / "pytorch_model.bin"
    names = json.loads((files / "key_to_filename.json").read_text())
    content = (files / names[FC1]).read_bytes()
    for change, message in {
        content[:-9]: f"{names[FC1]} is broken",
        b"": f"{names[FC1]} is broken",
        None: f"lacks pytorch_model.bin/{names[FC1]}, which key_to_filename.json names",
    }.items():
        (files / names[FC1]).unlink()
        if change is not None:
            (files / names[FC1]).write_bytes(change)
        with pytest.raises(CheckpointError, match=message):
            assert_same_tensors(open_directory(tmp_path, model.config), model)
    torch.save({"a": torch.zeros(1)}, files / names[FC1])
    with pytest.raises(CheckpointError, match="it holds a dict, not a tensor"):
        assert_same_tensors(open_directory(tmp_path, model.config), model)
    (files / "x.empty_json").write_text("{}")
    (files / "key_to_filename.json").write_text(json.dumps({**names, FC1: "x.empty_json"}))
    with pytest.raises(CheckpointError, match="random values instead of holding a tensor"):
        assert_same_tensors(open_directory(tmp_path, model.config), model)
    (files / "key_to_filename.json").write_text(json.dumps({**names, FC1: "../outside"}))
    with pytest.raises(CheckpointError, match="points outside of its directory"):
        open_directory(tmp_path, tiny_config())


def test_every_format_of_the_source_gives_the_same_files(tmp_path):
    """Byte for byte from every source: in each format, with and without the prefix and a tied head."""
    model = tiny_opt(num_hidden_layers=3)
    sources = {form: tmp_path / form for form in (*FORMS, "old split", "without prefix", "tied head")}
    for form, save_in in FORMS.items():
        save_in(model, sources[form])
    save_old_split(model, sources["old split"])
    model.model.save_pretrained(sources["without prefix"])
    sources["tied head"].mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, sources["tied head"] / "model.safetensors")
    save = model.config.save_pretrained
    write_split(open_model(model, checkpoint_files(model.config, "f16")), tmp_path / "expected", "f16", save)
    expected = {file.name: file.read_bytes() for file in (tmp_path / "expected").glob("*.safetensors")}
    assert len(expected) == 4
    for form, source in sources.items():
        write_split(open_directory(source, model.config, "f16"), tmp_path / "out" / form, "f16", save)
        for name, content in expected.items():
            assert (tmp_path / "out" / form / name).read_bytes() == content, (form, name)


def test_pytorch_files_of_the_time_before_zip(tmp_path):
    model = tiny_opt()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_tensors(open_directory(tmp_path, model.config), model)


def test_safetensors_are_preferred(tmp_path):
    model, other = tiny_opt(), tiny_opt(seed=1)
    model.save_pretrained(tmp_path)
    save_as_pytorch(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "pytorch_model.bin", tmp_path)
    assert_same_tensors(open_directory(tmp_path, model.config), model)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights: expected model.safetensors.*pytorch_model.bin"):
        open_directory(tmp_path, tiny_config())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\xff" * 4096, b"PK\x03\x04 zip?"],
)
def test_files_that_are_no_checkpoints(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is broken or not a checkpoint file"):
        open_directory(tmp_path, tiny_config())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(form, share, tmp_path):
    model = tiny_opt()
    FORMS[form](model, tmp_path)
    last = sorted([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")])[-1]
    content = last.read_bytes()
    last.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=last.name):
        assert_same_tensors(open_directory(tmp_path, model.config), model)


class Harmful:
    """Code in a pickle, which must not be run."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", [Harmful(), {"a": Harmful()}, [torch.zeros(1)], torch.zeros(1)])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_that_hold_something_else(content, zipped, tmp_path, capsys):
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="broken or not a checkpoint file"):
        open_directory(tmp_path, tiny_config())
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8),
        torch.empty(2, device="meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
def test_tensors_that_are_not_plain(tensor, tmp_path):
    torch.save({FC1: tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="broken or not a checkpoint file.*sparse, quantized or without data"):
        open_directory(tmp_path, tiny_config())


def test_an_archive_that_was_compressed(tmp_path):
    """Mapped, it would give other values."""
    save_as_pytorch(tiny_opt(), tmp_path)
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records:
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="it is compressed"):
        open_directory(tmp_path, tiny_config())


@pytest.mark.parametrize(("mark", "offset", "value"), [(b"PK\x01\x02", 0, 0), (b"PK\x06\x07", 4, 1)])
def test_archives_that_fuzzing_found(mark, offset, value, tmp_path):
    """A signature and a number for which zipfile raises an error of its own type."""
    save_as_pytorch(tiny_opt(), tmp_path)
    file = tmp_path / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    content[content.index(mark) + offset] = value
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="pytorch_model.bin is broken or not a checkpoint file"):
        open_directory(tmp_path, tiny_config())


def test_plain_pickle_is_not_run(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match="broken or not a checkpoint file"):
        open_directory(tmp_path, tiny_config())
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded pytorch"])
def test_missing_shard(form, tmp_path):
    FORMS[form](tiny_opt(), tmp_path)
    shard = sorted([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")])[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}, which its .*index.json names"):
        open_directory(tmp_path, tiny_config())


@pytest.mark.parametrize("outside", ["../model.safetensors", "/model.safetensors", "a/model.safetensors"])
def test_index_that_points_outside(outside, tmp_path):
    directory = tmp_path / "inner"
    tiny_opt().save_pretrained(directory, max_shard_size="60KB")
    save_file(load_file(sorted(directory.glob("*.safetensors"))[0]), tmp_path / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][FC1] = outside
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="points outside of its directory"):
        open_directory(directory, tiny_config())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": {"a": 3, "b": "c"}}', '{"weight_map": 3}', '{"weight_map": ["a"]}', "\x00"],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_broken_index(index, content, tmp_path):
    (tmp_path / index).write_text(content)
    with pytest.raises(CheckpointError, match=f"{index} is not a checkpoint index"):
        open_directory(tmp_path, tiny_config())
