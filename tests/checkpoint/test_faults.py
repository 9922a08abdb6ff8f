"""Faults while a split checkpoint is written: kills at any moment, full disks, other writers."""

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import tiny_config, tiny_opt
from transformers import OPTForCausalLM

from optimum_opt_trn import CheckpointError, save_pretrained_split
from optimum_opt_trn.checkpoint import verify_checkpoint
from optimum_opt_trn.checkpoint.hub import open_checkpoint
from optimum_opt_trn.checkpoint.layout import INDEX_NAME, checkpoint_files
from optimum_opt_trn.checkpoint.lock import one_writer
from optimum_opt_trn.checkpoint.manifest import MANIFEST_NAME, UNFINISHED_NAME, read_manifest
from optimum_opt_trn.checkpoint.small_files import save_config
from optimum_opt_trn.checkpoint.write import write_split


F16 = "f16"
KILLED = 77


@pytest.fixture
def source(tmp_path) -> Path:
    tiny_opt().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def split(source: Path, output: Path, amp: str = F16) -> None:
    weights = open_checkpoint(source, checkpoint_files(tiny_config(), amp)).weights
    write_split(weights, output, amp, partial(save_config, tiny_config(), amp))


def weights_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


def times_of(directory: Path) -> dict[str, tuple[int, int]]:
    """For each file, the numbers that change when it is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in directory.iterdir()}


def killed_at(moment: int, source: Path, output: Path) -> bool:
    """Splits in a process that ends, as if killed, before it changes the file system for the `moment`th time.

    Returns:
        Whether it came to that.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            count += 1
            if count == moment:
                os._exit(KILLED)

    status = 1
    try:
        sys.addaudithook(hook)
        split(source, output)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("before", ["nothing", "another model", "another dtype"])
def test_killed_at_any_moment(before, source, tmp_path):
    """The directory then has no index, or is complete; and the next run completes it."""
    split(source, tmp_path / "expected")
    expected = weights_of(tmp_path / "expected")
    if before != "nothing":
        other = tiny_opt(seed=1 if before == "another model" else 0)
        amp = F16 if before == "another model" else "bf16"
        other.save_pretrained(tmp_path / "other")
        split(tmp_path / "other", tmp_path / "old", amp)
    moment, killed = 0, True
    while killed:
        moment += 1
        output = tmp_path / "output"
        if before != "nothing":
            shutil.copytree(tmp_path / "old", output)
        killed = killed_at(moment, source, output)
        if (output / INDEX_NAME).exists():
            verify_checkpoint(output)
            assert weights_of(output) in (expected, weights_of(tmp_path / "old")), moment
        if moment % 8 == 0 or not killed:  # each costs a second split
            split(source, output)
            verify_checkpoint(output)
            assert weights_of(output) == expected
            assert {f.name for f in output.iterdir()} == {*expected, INDEX_NAME, MANIFEST_NAME, "config.json"}
        shutil.rmtree(output, ignore_errors=True)
    assert moment > 20, "it was killed often enough to say so"


def test_a_run_goes_on_from_what_is_there(source, tmp_path, monkeypatch):
    output = tmp_path / "output"
    with monkeypatch.context() as patched:
        read = patched_to_fail(patched, "model.decoder.layers.1.fc2.weight", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            split(source, output)
        assert read
    assert not (output / INDEX_NAME).exists() and not (output / MANIFEST_NAME).exists()
    unfinished = read_manifest(output / UNFINISHED_NAME)
    assert unfinished is not None
    done = times_of(output)
    assert unfinished.files.keys() == {name for name in done if name.endswith(".safetensors")} != set()
    split(source, output)
    verify_checkpoint(output)
    after = times_of(output)
    assert all(after[name] == done[name] for name in unfinished.files)
    assert not (output / UNFINISHED_NAME).exists()


def patched_to_fail(patched, name: str, error: BaseException) -> list[str]:
    """Makes reading the tensor `name` raise; returns the list of names that are read before."""
    from optimum_opt_trn.checkpoint.source import WeightSource

    chunks, seen = WeightSource.chunks, []

    def failing(self, asked, *arguments):
        if asked == name:
            raise error
        seen.append(asked)
        return chunks(self, asked, *arguments)

    patched.setattr(WeightSource, "chunks", failing)
    return seen


@pytest.mark.parametrize("kind", ["directory", "model"])
def test_files_that_are_there_and_unchanged_are_not_written(kind, source, tmp_path):
    given = source if kind == "directory" else OPTForCausalLM.from_pretrained(source)
    output = save_pretrained_split(given, tmp_path / "output")
    before = times_of(output)
    save_pretrained_split(given, output)
    assert times_of(output) == before


def test_a_source_that_changed_is_split_again_where_it_changed(source, tmp_path):
    """Shards that did not change are not read again, and small files are updated."""
    model = tiny_opt(num_hidden_layers=3)
    sharded, output = tmp_path / "sharded", tmp_path / "output"
    model.save_pretrained(sharded, max_shard_size="60KB")
    save_pretrained_split(sharded, output)
    before, name = times_of(output), "model.decoder.layers.2.fc1.bias"
    shard = sharded / json.loads((sharded / INDEX_NAME).read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file({**tensors, name: tensors[name] + 1}, shard, metadata={"format": "pt"})
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "bos_token_id": 7}))
    save_pretrained_split(sharded, output)
    verify_checkpoint(output)
    changed = {file for file, times in times_of(output).items() if times != before[file]}
    assert {"layer_002.safetensors", "config.json"} <= changed
    assert "layer_000.safetensors" not in changed
    assert torch.equal(load_file(output / "layer_002.safetensors")[name], (tensors[name] + 1).half())
    assert json.loads((output / "config.json").read_text())["bos_token_id"] == 7


def test_a_file_that_was_damaged_since_is_written_again(source, tmp_path):
    output = save_pretrained_split(source, tmp_path / "output")
    expected = weights_of(output)
    content = bytearray(expected["layer_001.safetensors"])
    content[-1] ^= 1
    (output / "layer_001.safetensors").write_bytes(content)
    (output / MANIFEST_NAME).write_text((output / MANIFEST_NAME).read_text())
    save_pretrained_split(source, output)
    assert weights_of(output) == expected
    (output / MANIFEST_NAME).write_text("{")
    save_pretrained_split(source, output)
    assert weights_of(output) == expected
    verify_checkpoint(output)


def test_another_writer(source, tmp_path):
    with one_writer(tmp_path / "output"), pytest.raises(BlockingIOError, match="output is being written by another"):
        split(source, tmp_path / "output")
    assert not list((tmp_path / "output").iterdir())
    split(source, tmp_path / "output")
    verify_checkpoint(tmp_path / "output")


def test_the_source_itself_is_not_written_to(source, tmp_path):
    first = save_pretrained_split(source, tmp_path / "first")
    (tmp_path / "link").symlink_to(first)
    for output in (first, tmp_path / "link"):
        with pytest.raises(FileExistsError, match="is the source itself"):
            save_pretrained_split(first, output, "bf16")
    verify_checkpoint(first)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB."""
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_too_small_is_told_before(source, small_disk):
    (small_disk / "other").write_bytes(bytes(200_000))
    with pytest.raises(OSError, match=r"needs 188\.\d+ KiB, and its disk has .* KiB free") as error:
        split(source, small_disk / "output")
    assert error.value.errno == errno.ENOSPC
    assert not weights_of(small_disk / "output") and not (small_disk / "output" / INDEX_NAME).exists()


def test_a_disk_that_fills_up(source, small_disk, monkeypatch):
    """Something else fills it during the run. A run with more space continues."""
    monkeypatch.setattr("optimum_opt_trn.checkpoint.write._check_space", lambda *arguments: None)
    filler = small_disk / "other"
    filler.write_bytes(bytes(160_000))
    output = small_disk / "output"
    with pytest.raises(OSError, match="No space is left for .*output: free some") as error:
        split(source, output)
    assert error.value.errno == errno.ENOSPC
    assert not (output / INDEX_NAME).exists() and not list(output.glob("*.partial"))
    with pytest.raises(OSError):
        OPTForCausalLM.from_pretrained(output)
    done = times_of(output)
    filler.unlink()
    split(source, output)
    verify_checkpoint(output)
    kept = [name for name in weights_of(output) if name in done]
    assert kept and all(times_of(output)[name] == done[name] for name in kept)


def test_a_link_takes_the_place_of_a_copy(source, tmp_path):
    first = save_pretrained_split(source, tmp_path / "first")
    second = save_pretrained_split(first, tmp_path / "second")
    assert all((first / name).samefile(second / name) for name in weights_of(first))
    verify_checkpoint(second)
    # A file that was changed is not linked: it differs from its manifest.
    third = save_pretrained_split(source, tmp_path / "third")
    tensors = load_file(third / "layer_001.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, third / "layer_001.safetensors")
    fourth = save_pretrained_split(third, tmp_path / "fourth")
    linked = {name for name in weights_of(third) if (third / name).samefile(fourth / name)}
    assert linked == weights_of(third).keys() - {"layer_001.safetensors"}
    assert weights_of(fourth) == weights_of(first)
    verify_checkpoint(fourth)


def test_weights_without_data(tmp_path):
    with torch.device("meta"):
        model = OPTForCausalLM(tiny_config())
    with pytest.raises(CheckpointError, match="has no data: it is on the meta device"):
        save_pretrained_split(model, tmp_path / "output")
