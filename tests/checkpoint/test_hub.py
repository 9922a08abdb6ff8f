"""Fetching from a hub, and publishing to it: a server on this host that speaks the hub's protocol."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub.errors import HfHubHTTPError
from requirements import needs_lfs_uploads
from small_models import SHIPPED_MODEL, save_as_pytorch, tiny_opt
from transformers import AutoTokenizer

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.checkpoint import push_to_hub, verify_checkpoint
from optimum_opt_trn.export import export_opt


# huggingface_hub reads its environment when it is imported, so downloads run in a process of their own. It runs each
# of the commands in its argument, and prints the error of each as JSON.
CLIENT = """
import json, sys
import optimum_opt_trn
from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.export import export_opt
errors = []
for command in json.loads(sys.argv[1]):
    try:
        exec(command)
        errors.append("")
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint in several shards."""
    directory = tmp_path_factory.mktemp("hub") / "source"
    tiny_opt(num_hidden_layers=4).save_pretrained(directory, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def split(source) -> Path:
    return save_pretrained_split(source, source.parent / "split")


@pytest.fixture
def hub(monkeypatch):
    """A server that this process takes for the hub, since that decides how it reads addresses."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        yield server


def client(hub: HubServer, home: Path, *commands: str) -> list[str]:
    """What the commands raised, in a process whose hub is `hub`, with its own cache."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLIENT, json.dumps(commands)],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
        cwd=home.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def weights_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


def shards(home: Path) -> list[str]:
    """The names of the weight files in a cache, without its notes of missing files."""
    return sorted(file.name for file in home.rglob("snapshots/*/*") if file.suffix in (".safetensors", ".bin"))


def test_from_the_hub_file_by_file(source, split, tmp_path):
    """With the files kept in the cache, or not; interrupted and continued; in every format."""
    names = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(names) > 3
    (tmp_path / "bin").mkdir()
    save_as_pytorch(tiny_opt(num_hidden_layers=4), tmp_path / "bin", 150_000)
    tiny_opt(num_hidden_layers=4).save_pretrained(tmp_path / "single")
    home = tmp_path / "home"
    with HubServer() as hub:
        hub.add("tiny/opt", source)
        hub.add("tiny/bin", tmp_path / "bin")
        hub.add("tiny/single", tmp_path / "single")
        hub.repositories["tiny/empty"] = hub.repositories["tiny/opt"].__class__()
        hub.repositories["tiny/empty"].commit("main", {"config.json": (source / "config.json").read_bytes()})
        hub.break_after = 300_000
        split_it = "save_pretrained_split('tiny/opt', 'frugal', delete_source_shards=True)"
        (broken,) = client(hub, home, split_it)
        hub.break_after = None
        assert broken and "CheckpointError" not in broken
        frugal = tmp_path / "frugal"
        assert not (frugal / "model.safetensors.index.json").exists()
        done = {file: file.stat().st_mtime_ns for file in frugal.glob("*.safetensors")}
        assert done, "some layers came through"
        hub.downloads.clear()
        errors = client(
            hub,
            home,
            split_it,
            "assert not [f for f in __import__('pathlib').Path('frugal').rglob('*') if f.name.startswith('model-')]",
            "assert not list(__import__('pathlib').Path('home').rglob('snapshots/*/*.safetensors'))",
            "save_pretrained_split('tiny/opt', 'cached')",
            "save_pretrained_split('tiny/opt', 'offline', local_files_only=True)",
            "save_pretrained_split('tiny/opt', 'again', delete_source_shards=True)",
            "save_pretrained_split('tiny/bin', 'from_bin')",
            "save_pretrained_split('tiny/single', 'from_single', delete_source_shards=True)",
            "export_opt('tiny/opt', 'export', OPTNeuronConfig(sequence_length=64), eager=True)",
            "save_pretrained_split('tiny/empty', 'nothing')",
            "save_pretrained_split('tiny/nowhere', 'nothing')",
        )
        assert errors[:-2] == [""] * (len(errors) - 2)
        assert "tiny/empty has no weights" in errors[-2]
        assert errors[-1].startswith(
            "OSError: tiny/nowhere is not a local directory, and cannot be fetched from the hub"
        )
    assert all(file.stat().st_mtime_ns == time for file, time in done.items()), "what was done is not done again"
    assert shards(home / "hub" / "models--tiny--opt") == names, "a cache that is there already stays"
    assert not shards(home / "hub" / "models--tiny--single")
    for directory in ("frugal", "cached", "offline", "again", "from_bin", "from_single", "export/checkpoint"):
        assert weights_of(tmp_path / directory) == weights_of(split), directory
        verify_checkpoint(tmp_path / directory)
        assert not (tmp_path / directory / ".source_shards").exists()
    ids = [AutoTokenizer.from_pretrained(path)("It was").input_ids for path in (source, frugal)]
    assert ids[0] == ids[1]


@needs_lfs_uploads
def test_publishing(hub, split, tmp_path):
    export = export_opt(split, tmp_path / "export", OPTNeuronConfig(sequence_length=64), eager=True)
    (export / ".hidden").write_text("left over")
    address = NeuronOPTForCausalLM.from_pretrained(export, eager=True).push_to_hub(
        str(export), "me/opt-export", token="hf_token", endpoint=hub.endpoint
    )
    assert address.startswith(f"{hub.endpoint}/me/opt-export/commit/")
    assert len(hub.commits) == 1, "the repository is never half of the export"
    files = {str(file.relative_to(export)) for file in export.rglob("*") if file.is_file()} - {".hidden"}
    assert set(hub.commits[0]) == files
    # Again: the hub has all files.
    transferred = len(hub.uploads)
    push_to_hub(export, "me/opt-export", token="hf_token", endpoint=hub.endpoint)
    assert len(hub.uploads) == transferred and len(hub.commits) == 1
    # Only the checkpoint, on a branch: its files are there already.
    push_to_hub(split, "me/opt-split", token="hf_token", endpoint=hub.endpoint, revision="f16")
    assert len(hub.uploads) == transferred and len(hub.commits) == 2
    errors = client(
        hub,
        tmp_path / "home",
        "NeuronOPTForCausalLM.from_pretrained('me/opt-export', eager=True, verify=True)",
        "save_pretrained_split('me/opt-split', 'copy', revision='f16')",
    )
    assert errors == ["", ""]
    assert weights_of(tmp_path / "copy") == weights_of(split)


@needs_lfs_uploads
def test_an_upload_that_broke_off_goes_on(hub, split):
    """Files that the hub has are not sent again, and no commit has only a part of them."""
    sizes = {file.name: file.stat().st_size for file in split.glob("*.safetensors")}
    hub.break_after = sum(sizes.values()) // 2
    with pytest.raises(RuntimeError) as raised:
        push_to_hub(split, "me/opt", token="hf_token", endpoint=hub.endpoint)
    assert isinstance(raised.value.__cause__, HfHubHTTPError)
    assert not hub.commits
    hub.break_after, there = None, set(hub.stored)
    assert there, "something came through"
    hub.uploads.clear()
    push_to_hub(split, "me/opt", token="hf_token", endpoint=hub.endpoint)
    assert not there & {oid for oid, _ in hub.uploads}
    (repo,) = hub.repositories.values()
    files = repo.commits[repo.branches["main"]]
    assert {name: len(files[name]) for name in sizes} == sizes


def test_what_is_not_whole_is_not_published(split, tmp_path):
    shutil.copytree(split, tmp_path / "broken")
    for path, change in {
        "model.safetensors.index.json": lambda content: None,
        "layer_001.safetensors": lambda content: content[:-1],
        "split_manifest.json": lambda content: None,
    }.items():
        file = tmp_path / "broken" / path
        content = file.read_bytes()
        changed = change(content)
        file.unlink() if changed is None else file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"is not uploaded, since it is incomplete.*{path}"):
            push_to_hub(tmp_path / "broken", "me/opt", token="hf_token", endpoint="http://127.0.0.1:9")
        file.write_bytes(content)


def test_frugality_is_not_for_local_sources(source, tmp_path):
    with pytest.raises(ValueError, match="delete_source_shards is for ids on the hub"):
        save_pretrained_split(source, tmp_path / "out", delete_source_shards=True)
    assert not (tmp_path / "out").exists()
