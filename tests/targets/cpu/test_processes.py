"""Real processes that hold a model together give what one process gives, and none waits for what will not come."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest
import torch
from against_transformers import ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, rounded, tiny_opt
from torch import Tensor
from worker import Late, calls  # beside this file

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.targets import TargetError
from optimum_opt_trn.targets.cpu.processes import local_degree
from optimum_opt_trn.targets.cpu.sockets import OutOfStepError, Sockets


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


def test_each_way_has_its_transport(by_torchrun, on_two_hosts):
    assert [f["transport"] for f in by_torchrun] == ["Sockets"] * 2
    assert [f["transport"] for f in on_two_hosts] == ["Gloo"] * 2


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
        assert torch.equal(mine["lookup"], greedy[:1])
        assert torch.equal(mine["beams"], beams)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_first_ones_seed_counts_and_all_agree(name, found, exported):
    alone = calls(NeuronOPTForCausalLM.from_pretrained(exported / name), BATCH, seed=100)
    first, second = (f["models"][name] for f in found)
    for what, expected in alone.items():
        assert torch.equal(first[what], second[what]), what  # to the bit, logits too
        if what == "logits":
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


@pytest.mark.parametrize("what", ["other_ids", "other_width", "other_temperature", "other_export"])
def test_different_inputs_are_an_error_in_all(what, found):
    for f in found:
        assert "OutOfStepError: " in f[what]
        assert "process 1 has other inputs than process 0" in f[what]


def test_too_few_ranks_are_an_error_before_anything_is_written(found):
    for f in found:
        assert f["too_few_ranks"].startswith("TargetError: 2 processes")
        assert "tp_degree=1: export with tp_degree=2" in f["too_few_ranks"]


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
    with pytest.raises(TargetError, match=rf"WORLD_SIZE={count}.*tp_degree={degree}: .*tp_degree={suggested},"):
        local_degree(degree)
    assert local_degree(suggested) == suggested // count


# Three and more processes, as threads.


def connected(count: int) -> list[Sockets]:
    peers: list[dict[int, socket.socket]] = [{} for _ in range(count)]
    for a, b in combinations(range(count), 2):
        peers[a][b], peers[b][a] = socket.socketpair()
    return [Sockets(rank, connections) for rank, connections in enumerate(peers)]


def exchanged(worlds: list[Sockets], kinds: list[int], tensors: list[Tensor]) -> list[Future]:
    with ThreadPoolExecutor(len(worlds)) as pool:
        return [
            pool.submit(world.exchange, kind, tensor)
            for world, kind, tensor in zip(worlds, kinds, tensors, strict=True)
        ]


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.lists(st.sampled_from([0, 1, 3, 2048, 100_000, 1_000_000]), min_size=1, max_size=3))
def test_sockets_carry_tensors_of_any_size_in_order(count, sizes):
    worlds = connected(count)
    for number, size in enumerate(sizes):
        tensors = [torch.randn(size, generator=torch.Generator().manual_seed(100 * number + r)) for r in range(count)]
        for future in exchanged(worlds, [number] * count, tensors):
            assert all(torch.equal(a, b) for a, b in zip(future.result(), tensors, strict=True))
    for world in worlds:
        world.close()


@pytest.mark.parametrize(
    "kinds, sizes", [([1, 1, 2], [4, 4, 4]), ([1, 1, 1], [4, 4, 5]), ([1, 1, 1], [0, 0, 100_000])]
)
def test_sockets_notice_that_another_message_was_due(kinds, sizes):
    worlds = connected(3)
    futures = exchanged(worlds, kinds, [torch.zeros(size) for size in sizes])
    assert all(isinstance(future.exception(), OutOfStepError) for future in futures)
    for world in worlds:  # nor does anybody wait later
        with pytest.raises(OutOfStepError, match="has ended or failed"):
            world.exchange(1, torch.zeros(4))


def test_sockets_sleep_while_a_process_is_late():
    worlds = connected(2)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(worlds[0].exchange, 1, torch.ones(5))
        with pytest.raises(TimeoutError):
            early.result(timeout=0.1)
        late = worlds[1].exchange(1, torch.zeros(5))
        assert [part.sum().item() for part in early.result()] == [part.sum().item() for part in late] == [5, 0]
