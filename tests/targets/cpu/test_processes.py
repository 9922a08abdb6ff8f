"""Real processes that share a model give what one process gives, and none waits for what will not come."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from against_transformers import ragged
from small_models import KINDS, rounded, tiny_opt
from worker import Late, calls  # beside this file

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.targets import TargetError
from optimum_opt_trn.targets.cpu.processes import local_degree


WORKER = Path(__file__).with_name("worker.py")
# Name of an export: its kind, its ranks, and whether it runs eagerly.
EXPORTS = {
    "export-pre_norm-2": ("pre_norm", 2, True),
    "export-pre_norm-4": ("pre_norm", 4, False),
    "export-post_norm-2": ("post_norm", 2, True),
    "export-odd_vocabulary-2": ("odd_vocabulary", 2, True),
}
BATCH = ragged([9, 4, 7])


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("processes")
    for name, (kind, tp_degree, eager) in EXPORTS.items():
        source = directory / "sources" / kind
        tiny_opt(**KINDS[kind]).save_pretrained(source)
        options = {"tp_degree": tp_degree, "batch_size": 3, "sequence_length": 64, "kv_cache_dtype": "f32"}
        export_opt(source, directory / name, OPTNeuronConfig(**options), eager=eager)
    shutil.copytree(directory / "sources" / "pre_norm", directory / "source")
    shutil.copytree(directory / "source", directory / "broken")
    (directory / "broken" / "model.safetensors").write_bytes(b"\0" * 100)
    torch.save(BATCH, directory / "batch.pt")
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def by_torchrun(exported, tmp_path_factory) -> list[dict]:
    """What two processes of torchrun found."""
    directory = tmp_path_factory.mktemp("torchrun") / "run"
    shutil.copytree(exported, directory)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "--master_port", str(free_port()), str(WORKER), str(directory)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return found_in(directory, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def on_two_hosts(exported, tmp_path_factory) -> list[dict]:
    """The same for two processes that are told that each is on a host of its own."""
    directory = tmp_path_factory.mktemp("hosts") / "run"
    shutil.copytree(exported, directory)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(directory)],
            env={**os.environ, **common, "RANK": rank, "GROUP_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    return found_in(directory, "\n".join(said))


def found_in(directory: Path, said: str) -> list[dict]:
    files = [directory / f"{rank}.pt" for rank in range(2)]
    assert all(file.is_file() for file in files), said
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(params=["by_torchrun", "on_two_hosts"])
def found(request) -> list[dict]:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", EXPORTS)
def test_they_give_what_transformers_gives(name, found):
    kind, tp_degree, _ = EXPORTS[name]
    reference = rounded(tiny_opt(**KINDS[kind]))
    ours = [f["models"][name] for f in found]
    assert [list(o["ranks"]) for o in ours] == [
        list(range(tp_degree // 2)),
        list(range(tp_degree // 2, tp_degree)),
    ]
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    single = {"input_ids": BATCH["input_ids"][:1]}
    with torch.no_grad():
        logits = reference(**BATCH).logits
        greedy = reference.generate(**BATCH, **asked)
        beams = reference.generate(**single, **asked, num_beams=3, num_return_sequences=2)
    real = BATCH["attention_mask"].bool()
    for mine in ours:
        torch.testing.assert_close(mine["logits"][real], logits[real], atol=1e-3, rtol=1e-4)
        assert torch.equal(mine["greedy"], greedy)
        assert torch.equal(mine["embeddings"], greedy)
        assert torch.equal(mine["lookup"], greedy[:1])
        assert torch.equal(mine["beams"], beams)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_first_ones_seed_counts_and_all_agree(name, found, exported):
    alone = calls(NeuronOPTForCausalLM.from_pretrained(exported / name), BATCH, seed=100)
    first, second = (f["models"][name] for f in found)
    for what, expected in alone.items():
        assert torch.equal(first[what], second[what]), what  # to the bit, logits too
        if what in ("logits", "attentions", "hidden_states"):
            torch.testing.assert_close(first[what], expected, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(first[what], expected), what
    assert not torch.equal(alone["device"], alone["greedy"])


def test_the_first_one_ends_the_call(found):
    for f in found:
        assert f["stopped"].shape[1] == BATCH["input_ids"].shape[1] + 3
    width = BATCH["input_ids"].shape[1]
    assert not Late(1, width)(torch.zeros(1, width + 3), torch.zeros(1)).any()  # the second would have gone on


def test_one_process_of_a_host_exports(by_torchrun, on_two_hosts):
    for found in (by_torchrun, on_two_hosts):
        expected = found[0]["models"]["export-pre_norm-2"]["greedy"]
        assert all(torch.equal(f["made"], expected) for f in found)
    assert by_torchrun[0]["made_in"] == by_torchrun[1]["made_in"]
    assert on_two_hosts[0]["made_in"] != on_two_hosts[1]["made_in"]


def test_the_first_one_saves(by_torchrun, tmp_path_factory):
    run = tmp_path_factory.getbasetemp() / "torchrun0" / "run"
    assert (run / "saved-0" / "neuron_config.json").is_file()
    assert not (run / "saved-1").exists()


def test_what_fails_in_one_fails_in_all(by_torchrun, on_two_hosts):
    first, second = (f["failed_export"] for f in by_torchrun)
    assert first.startswith("CheckpointError: ")
    assert second.startswith(f"OutOfStepError: Process 0 failed, and the others with it. It says: {first[:40]}")
    assert [f["failed_export"].partition(":")[0] for f in on_two_hosts] == ["CheckpointError"] * 2


@pytest.mark.parametrize(
    "what", ["other_ids", "other_width", "other_temperature", "other_embeddings", "other_inner", "other_export"]
)
def test_different_inputs_are_an_error_in_all(what, found):
    for f in found:
        assert "OutOfStepError: " in f[what]
        assert "process 1 has other inputs than process 0" in f[what]


def test_too_few_ranks_are_an_error_before_anything_is_written(found):
    for f in found:
        assert f["too_few_ranks"].startswith("TargetError: tp_processes=2")
        assert "tp_degree=1: export with tp_degree=2" in f["too_few_ranks"]
        assert f["another_number"].startswith("TargetError: tp_processes=4, and 2 process(es) were started")


def test_by_default_each_process_has_its_own_model(found, exported):
    """Under torchrun too: another prompt in each, all ranks in each."""
    alone = NeuronOPTForCausalLM.from_pretrained(exported / "export-pre_norm-2")
    for rank, f in enumerate(found):
        assert list(f["own"]["ranks"]) == [0, 1]
        prompt = BATCH["input_ids"][rank : rank + 1, -3:]
        assert torch.equal(f["own"]["tokens"], alone.generate(prompt, max_new_tokens=4, do_sample=False))


def test_after_an_error_the_next_call_is_right(found):
    for f in found:
        assert torch.equal(f["after"], f["made"])


def test_nobody_waits_for_a_process_that_ended(found):
    for name in ("died", "again"):
        assert found[0][name].startswith("OutOfStepError: "), found[0][name]
        assert "ended" in found[0][name]
    assert "died" not in found[1]


@pytest.mark.parametrize("count, degree, suggested", [(2, 1, 2), (2, 3, 4), (4, 2, 4), (3, 8, 9)])
def test_numbers_that_do_not_divide(monkeypatch, count, degree, suggested):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(TargetError, match=rf"tp_processes={count} .*tp_degree={degree}: .*tp_degree={suggested},"):
        local_degree(degree, count)
    assert local_degree(suggested, count) == suggested // count
    assert local_degree(degree, 1) == degree


def test_as_many_as_were_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(TargetError, match=r"tp_processes=2, and 1 process.*torchrun --nproc_per_node 2"):
        local_degree(4, 2)
