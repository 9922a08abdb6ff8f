"""The speed benchmark: what it computes, what it judges, and a run on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import tiny_opt
from transformers import AutoTokenizer, OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM, save_pretrained_split
from optimum_opt_trn.targets.cpu.coded import coded_bytes


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from decode_cpu import main, parse  # noqa: E402
from peers import OURS, PEERS, groups  # noqa: E402
from speed import environments, report  # noqa: E402
from speed.checkpoints import (  # noqa: E402
    cache_bytes,
    make_checkpoint,
    read_headers,
    shape_options,
    unread_head_bytes,
    weight_bytes,
)
from speed.claims import PASS, SHORT, UNKNOWN, check  # noqa: E402
from speed.neighbours import Neighbours  # noqa: E402
from speed.pairs import Pairs, Plan, agreeing  # noqa: E402
from speed.records import Record, Records, quartiles  # noqa: E402
from speed.workers import ContenderFailed, Worker, Workplace  # noqa: E402
from speed.zeros import Zeros, measure, plant, unread_layer_bytes  # noqa: E402


TINY = ["--shapes", "tiny", "--in_place", "--eager", "--threads", "1", "--contexts", "8", "--prompts", "8"]
ABOUT = {"threads": 2, "busy": 0, "zeros": None}
NO_ZEROS = Zeros([0.0, 0.0], {}, {})


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_quartiles_are_numpys(values):
    assert quartiles(values) == pytest.approx(tuple(np.percentile(values, [25, 75])))


def test_the_share_is_of_the_bandwidth_around_each_run():
    record = Record("1.3b", "g", "c", "decode", runs=[0.1, 0.2], bandwidths=[40e9, 10e9], bytes=[2e9, 2e9])
    assert record.shares == pytest.approx([0.5, 1.0])
    assert record.floors == pytest.approx([0.05, 0.2])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("tiny", tmp_path_factory.mktemp("made") / "checkpoint")


def test_checkpoint_is_whole_and_as_initialised(checkpoint, tmp_path):
    model, loading = OPTForCausalLM.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float16
    layer = model.model.decoder.layers[1]
    assert layer.fc1.weight.float().std().item() == pytest.approx(model.config.init_std, rel=0.05)
    assert layer.final_layer_norm.weight.float().mean().item() == pytest.approx(1, abs=0.02)
    again = make_checkpoint("tiny", tmp_path / "again")
    for file in checkpoint.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert AutoTokenizer.from_pretrained(checkpoint).convert_ids_to_tokens([2, 9]) == ["</s>", "t9"]


def test_bytes_of_a_step_are_those_of_the_files(checkpoint, tmp_path):
    options = {"batch_size": 1, "sequence_length": 64, "eager": True}
    NeuronOPTForCausalLM.from_pretrained(checkpoint, **options).save_pretrained(tmp_path / "export")
    files = (tmp_path / "export" / "checkpoint").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    read = [tensor for name, tensor in tensors.items() if "embed_positions" not in name]
    assert weight_bytes(read_headers(tmp_path / "export" / "checkpoint")) == sum(t.nbytes for t in read)
    matrices = sum(tensor.numel() for tensor in read if tensor.dim() == 2)
    apart = weight_bytes(read_headers(checkpoint), 4) - weight_bytes(read_headers(checkpoint), 1)
    assert apart == 3 * matrices
    keys = torch.zeros(3, 4, 10, 16, dtype=torch.float16)  # rows, heads, positions, head size
    assert cache_bytes(shape_options("tiny"), 3, 10, 2) == 2 * 2 * keys.nbytes


def test_a_copy_of_the_head_is_read_instead(checkpoint, tmp_path):
    for name, eager in (("eager", True), ("kernels", False)):
        options = {"batch_size": 1, "sequence_length": 64, "eager": eager}
        NeuronOPTForCausalLM.from_pretrained(checkpoint, **options).save_pretrained(tmp_path / name)
    head = torch.zeros(*(shape_options("tiny")[size] for size in ("vocab_size", "hidden_size")), dtype=torch.float16)
    copied = (head.to(torch.int8), torch.zeros(len(head), 1), torch.zeros(len(head)))
    assert unread_head_bytes(tmp_path / "eager") == 0
    assert unread_head_bytes(tmp_path / "kernels") == head.nbytes - sum(tensor.nbytes for tensor in copied)


@pytest.mark.parametrize(
    ("batch", "idle", "left", "fc1_read"),
    [(1, 0.9, 0.2, 0.2), (2, 0.8, 0.39, 0.39), (2, 0.8, 0.41, None), (4, 0.7, 0.1, None)],
)
def test_what_is_0_is_not_read(batch, idle, left, fc1_read, checkpoint, tmp_path):
    for name, eager in (("eager", True), ("kernels", False)):
        options = {"batch_size": 1, "sequence_length": 64, "eager": eager}
        NeuronOPTForCausalLM.from_pretrained(checkpoint, **options).save_pretrained(tmp_path / name)
    config, zeros = shape_options("tiny"), Zeros([idle] * 2, {batch: idle}, {batch: left})
    matrix = torch.zeros(config["ffn_dim"], config["hidden_size"], dtype=torch.float16)
    unread = idle * matrix.nbytes
    if fc1_read is not None:
        unread += (1 - fc1_read) * matrix.nbytes - matrix.to(torch.int8).nbytes
    assert unread_layer_bytes(tmp_path / "eager", batch, zeros) == 0
    assert unread_layer_bytes(tmp_path / "kernels", batch, zeros) == pytest.approx(
        config["num_hidden_layers"] * unread
    )


@pytest.mark.parametrize(
    ("batch", "idle", "left", "fc1", "fc2"),
    [
        (1, 0.9, 0.1, "screened", "coded"),
        (1, 0.9, 0.3, "coded", "coded"),  # the int8 copy would save less than a tenth
        (4, 0.5, 0.1, "coded", "coded"),
        (8, 0.5, 0.1, "coded", "coded"),
        (8, 0.3, 0.1, "coded", "coded, with zeros"),
        (16, 0.0, 0.1, "plain", "coded, with zeros"),
    ],
)
def test_coded_weights_are_read_instead(batch, idle, left, fc1, fc2, save_opt, tmp_path, monkeypatch):
    monkeypatch.setattr("speed.zeros.chosen_variant", lambda: "avx512_bf16")  # the bytes of a host that has it
    opt = tiny_opt(hidden_size=768, word_embed_proj_dim=768, ffn_dim=1024)
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(opt), batch_size=1, sequence_length=64, amp="bf16")
    model.save_pretrained(tmp_path / "out")
    plain, coded = torch.zeros(1, 768, dtype=torch.bfloat16).nbytes, coded_bytes(768)  # of a row
    read = 4 * 768 * (coded if batch <= 8 else plain)
    read += 1024 * {"screened": 768 + left * coded, "coded": coded, "plain": plain}[fc1]
    read += 1024 * {"coded": (1 - idle) * coded, "coded, with zeros": coded}[fc2]
    unread = opt.config.num_hidden_layers * ((4 * 768 + 2 * 1024) * plain - read)
    zeros = Zeros([idle] * 2, {batch: idle}, {batch: left})
    assert unread_layer_bytes(tmp_path / "out", batch, zeros) == pytest.approx(unread)


def test_an_untied_embedding_is_a_table():
    header = {"lm_head.weight": ((8, 4), 64), "model.decoder.embed_tokens.weight": ((8, 4), 64)}
    assert weight_bytes(header) == 64


def test_a_step_of_an_int8_export_reads_its_head_and_not_its_embedding(tmp_path):
    save_pretrained_split(tiny_opt(), tmp_path, "f16", weight_dtype="int8")
    tensors = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert tensors["lm_head.weight"].dtype == torch.int8
    tables = ("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight")
    read = sum(tensor.nbytes for name, tensor in tensors.items() if name not in tables)
    assert weight_bytes(read_headers(tmp_path)) == read


def test_rows_have_room_for_all_that_is_decoded():
    plan = Plan(batch=2, contexts=(64, 100), prompts=(120,), steps=4, rounds=5, loads=1)
    assert plan.room(100) == 100 + 1 + 4 * 6
    assert plan.length == 128


def test_agreement_counts_first_tokens():
    assert agreeing([1, 2, 3], [1, 2, 3]) == (3, 3)
    assert agreeing([1, 2, 3], [1, 9, 3]) == (1, 3)


def decoded(group: str, contender: str, seconds: float, shape="1.3b", batch=1) -> Record:
    """At 40 GB/s, with 2 GB to read."""
    runs = {"runs": [seconds] * 5, "bandwidths": [40e9] * 5, "bytes": [2e9] * 5}
    return Record(shape, group, contender, "decode", batch, 64, **runs)


def verdicts(*records: Record) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in check(Records(records))}


def test_nothing_is_claimed_of_what_was_not_measured():
    assert set(verdicts().values()) == {UNKNOWN}


@pytest.mark.parametrize("peer_seconds, verdict", [(0.080, PASS), (0.075, SHORT)])
def test_the_nearest_peer_decides(peer_seconds, verdict):
    found = verdicts(
        decoded("openvino-f16-f32", "ours-f16", 0.06),
        decoded("openvino-f16-f32", "openvino-f16-f32", peer_seconds),
        # On a machine that had become twice as slow, so its ratio counts, not its time.
        decoded("transformers-f16", "ours-f16", 0.12),
        decoded("transformers-f16", "transformers-f16", 0.24),
        # Beside one that computes in bfloat16, ours does too.
        decoded("openvino-f16-bf16", "ours-bf16", 0.04),
        decoded("openvino-f16-bf16", "openvino-f16-bf16", 0.06),
        # Not one with 16-bit weights.
        decoded("openvino-int8", "ours-f16", 0.06),
        decoded("openvino-int8", "openvino-int8", 0.03),
    )
    assert found["1.3b: 1.3 times the fastest peer with 16-bit weights, batch 1"] == verdict
    assert found["1.3b: 80 % of the probe's bandwidth, batch 1"] == PASS  # 50 ms of 60, in two groups of three


@pytest.mark.parametrize("peer_seconds, verdict", [(0.066, PASS), (0.064, SHORT)])
@pytest.mark.parametrize("float16_seconds, beside", [(0.081, PASS), (0.079, SHORT)])
def test_int8_weights_beside_float16_and_peers_with_int8_weights(peer_seconds, verdict, float16_seconds, beside):
    found = verdicts(
        *(decoded("openvino-int8", *one) for one in (("ours-f16", float16_seconds), ("ours-int8", 0.05))),
        decoded("openvino-int8", "openvino-int8", peer_seconds),
        *(decoded("torchao-tuned-int8", *one) for one in (("ours-f16", float16_seconds), ("ours-int8", 0.05))),
        decoded("torchao-tuned-int8", "torchao-tuned-int8", 0.2),
        # Its weights are in 16 bits.
        decoded("transformers-f16", "ours-f16", 0.05),
        decoded("transformers-f16", "transformers-f16", 0.05),
    )
    assert found["1.3b: int8 weights 1.6 times ours in float16, batch 1"] == beside
    assert found["1.3b: int8 weights 1.3 times the fastest peer with int8 weights, batch 1"] == verdict
    assert found["1.3b: int8 weights at 75 % of the probe's bandwidth, batch 1"] == PASS  # 50 ms of 50
    assert found["1.3b: int8 weights 1.6 times ours in float16, batch 2"] == UNKNOWN


def test_bandwidth_of_int8_weights_is_by_the_bytes_read():
    text = "1.3b: int8 weights at 75 % of the probe's bandwidth, batch 2"
    for seconds, verdict in ((0.066, PASS), (0.068, SHORT)):  # 2 GB at 40 GB/s are 50 ms
        assert verdicts(decoded("int8", "ours-int8", seconds, batch=2))[text] == verdict


def test_loads_and_exports_are_judged():
    def loaded(contender: str, load: float, first: float) -> list[Record]:
        where = ("1.3b", "transformers-f16", contender)
        return [Record(*where, "load", runs=[load] * 3), Record(*where, "first", length=32, runs=[first] * 3)]

    text = "1.3b: loaded to first token in a quarter of the fastest peer's time"
    peer = loaded("transformers-f16", 3.0, 1.0)
    assert verdicts(*peer, *loaded("ours-f16", 0.5, 0.5))[text] == PASS
    assert verdicts(*peer, *loaded("ours-f16", 0.5, 0.6))[text] == SHORT

    def export(contender: str, seconds: float, figure="convert", layers=0) -> Record:
        return Record("1.3b", "export", contender, figure, length=layers, runs=[seconds])

    text = "1.3b: exported no slower than the fastest converting peer converts"
    peers = export("onnxruntime-f32", 60), export("ctranslate2-f32", 30)
    assert verdicts(*peers, export("ours-f16", 29))[text] == PASS
    assert verdicts(*peers, export("ours-f16", 31))[text] == SHORT

    text = "1.3b: compile time flat in depth"
    shallow = export("ours-f16", 40, "compile", 2)
    assert verdicts(shallow, export("ours-f16", 44, "compile", 24))[text] == PASS
    assert verdicts(shallow, export("ours-f16", 60, "compile", 24))[text] == SHORT


def test_ranks_in_one_process_may_cost_5_percent():
    ours = decoded("tensor-parallel", "ours-f16", 0.06)
    text = "1.3b: ours-f16-tp2 within 5% of one rank, in one process"
    assert verdicts(ours, decoded("tensor-parallel", "ours-f16-tp2", 0.0625))[text] == PASS
    assert verdicts(ours, decoded("tensor-parallel", "ours-f16-tp2", 0.0635))[text] == SHORT


def test_groups_hold_ours_and_the_peer():
    for name, contenders in groups().items():
        rounds = name in PEERS and PEERS[name].compute == "bf16" and PEERS[name].weights != "int8"
        assert contenders[0] is OURS["ours-bf16" if rounds else "ours-f16"]
        if name in PEERS:
            assert contenders[-1] is PEERS[name]
            assert (OURS["ours-int8"] in contenders) == (PEERS[name].weights == "int8")
    for peer in PEERS.values():
        requirements = (BENCHMARKS / "peers" / f"{peer.environment}.txt").read_text().splitlines()
        assert all("==" in line for line in requirements if not line.startswith("#"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--contexts", "2040"], "2048 positions"),
        (["--batches", "0"], "1 or more"),
        (["--rounds", "-1"], "1 or more"),
        (["--peers", "vllm"], "invalid choice"),
        (["--keep"], "--directory"),
    ],
)
def test_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_the_longest_prompt_is_for_the_full_grid():
    assert parse([]).prompts == [32, 512]
    assert parse(["--full"]).prompts == [32, 512, 1536]


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    first = Records(
        [decoded("transformers-f16", "ours-f16", 0.06), decoded("transformers-f16", "transformers-f16", 0.1)]
    )
    report.write_report(tmp_path, ABOUT, first, [])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {f"decode_cpu.{kind}" for kind in ("json", "md", "png")}
    assert "| transformers-f16 | 1 | 64 | 100.0 [100.0, 100.0] | ours-f16 | 60.0" in before["decode_cpu.md"].decode()

    def killed(self, text):
        self.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(tmp_path, ABOUT, Records(), [])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_an_environment_that_matches_is_used_again(tmp_path, monkeypatch):
    def no_command(command):
        raise environments.EnvironmentFailed(str(command))

    monkeypatch.setattr(environments, "_run", no_command)
    (tmp_path / "openvino").mkdir()
    stamp = tmp_path / "openvino" / environments.STAMP
    stamp.write_text((BENCHMARKS / "peers" / "openvino.txt").read_text())
    assert environments.environment("openvino", tmp_path) == tmp_path / "openvino" / "bin" / "python"
    stamp.write_text("openvino==1\n")
    with pytest.raises(environments.EnvironmentFailed, match="venv"):
        environments.environment("openvino", tmp_path)


def test_a_worker_answers_with_errors_and_deaths(checkpoint, tmp_path):
    place = Workplace(tmp_path, None, threads=1, patience=60)
    with Worker(PEERS["transformers-f32"], place) as worker:
        worker.ask("load", directory=str(checkpoint))
        first = worker.ask("prefill", prompts=[[5, 6, 7]], room=8)[1]
        following = worker.ask("decode", steps=3)[1]
        with pytest.raises(ContenderFailed, match="loads the checkpoint as it is"):
            worker.ask("convert", source="", directory="", batch_size=1, length=8)
    model = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [*first, *following[0]] == expected[0, 3:].tolist()
    with Worker(PEERS["transformers-f32"], place) as worker:
        worker._process.kill()
        with pytest.raises(ContenderFailed, match="memory"):
            worker.ask("load", directory=str(checkpoint))


def test_a_run_of_ours_and_transformers(tmp_path, capsys, monkeypatch):
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    what = ["--peers", "transformers-f32", "--figures", "decode", "prefill", "--batches", "1", "--rounds", "2"]
    try:
        assert main([*TINY, *what, "--output", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "[not measured] 1.3b: 80 % of the probe's bandwidth, batch 1" in printed
    written = json.loads((tmp_path / "out" / "decode_cpu.json").read_text())
    assert not written["failures"]
    assert written["agreement"]["tiny"] == {"ours-f16": [9, 9], "transformers-f32": [9, 9]}
    records = Records(Record(**record) for record in written["records"])
    for contender in ("ours-f16", "transformers-f32"):
        for figure in ("decode", "prefill"):
            runs = records.one(contender=contender, figure=figure).runs
            assert len(runs) == 2 and all(seconds > 0 for seconds in runs)
        assert records.one(contender=contender, figure="resident").runs[0] > 50e6
    assert not any((tmp_path / "temporary").iterdir())


def test_a_run_that_is_ended_leaves_what_it_has(tmp_path):
    # The first peer's packages are no requirement of ours; the second is being measured when the run ends.
    what = ["--peers", "ctranslate2-f32", "transformers-f32", "--rounds", "200", "--figures", "decode"]
    command = [sys.executable, str(BENCHMARKS / "decode_cpu.py"), *TINY, *what, "--output", str(tmp_path / "out")]
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    file = tmp_path / "out" / "decode_cpu.json"
    try:
        for line in run.stdout:
            if "transformers-f32: batch 1, context" in line:
                break
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
        printed = run.communicate(timeout=60)[0]
    finally:
        run.kill()
    assert run.returncode == 143, printed
    failures = json.loads(file.read_text())["failures"]
    assert [(f["shape"], f["group"]) for f in failures] == [("tiny", "ctranslate2-f32")]
    assert "No module named 'ctranslate2'" in failures[0]["error"]
    assert not list((tmp_path / "out").glob(".partial*"))
    assert not any((tmp_path / "temporary").iterdir())


def test_steps_of_peers_are_counted_in_their_own_dtype(checkpoint, tmp_path):
    pairs = Pairs(
        "tiny", shape_options("tiny"), checkpoint, Workplace(tmp_path, None, 1, 60), lambda: 1.0, print, NO_ZEROS
    )
    both = [pairs.step_bytes(PEERS[name], 1, 0) for name in ("transformers-f16", "transformers-f32")]
    norms = sum(size for shape, size in read_headers(checkpoint).values() if len(shape) == 1)
    assert both[1] - norms == 2 * (both[0] - norms)


def test_planted_zeros_are_the_inputs_of_fc2(checkpoint, tmp_path):
    planted = plant(checkpoint, 0.9, tmp_path / "planted")
    model, ids = OPTForCausalLM.from_pretrained(planted, dtype=torch.float32), torch.randint(4, 512, (4, 40))
    seen = []
    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0] == 0).float().mean().item()))
    with torch.inference_mode():
        model(ids)
    assert seen == pytest.approx([0.9] * 2, abs=0.04)
    found = measure(planted)
    assert found.zero == pytest.approx([0.9] * 2, abs=0.02)
    assert found.idle[1] == pytest.approx(0.9, abs=0.02) and found.idle[4] < found.idle[2] < found.idle[1]
    assert 1 - found.idle[1] < found.left[1] < found.left[2] < 1 - found.idle[2] + 0.2
    before, after = load_file(checkpoint / "model-00001.safetensors"), load_file(planted / "model-00001.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.decoder.layers.0.fc1.bias"}


def test_neighbours_work_only_when_told():
    neighbours = Neighbours(1)
    process = neighbours._processes[0]

    def spent() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    try:
        time.sleep(0.1)
        before = spent()
        time.sleep(0.3)
        assert spent() == before
        with neighbours.working():
            while spent() < before + 3:
                time.sleep(0.05)
    finally:
        neighbours.close()
    assert process.returncode is not None


def test_claims_of_a_busy_run():
    ours, peer = decoded("ctranslate2-f32", "ours-f16", 0.1), decoded("ctranslate2-f32", "ctranslate2-f32", 0.13)
    ours.quiet = [0.04] * 5
    found = {claim.text: claim.verdict for claim in check(Records([ours, peer]), busy=1)}
    assert found["1.3b: 1.2 times the fastest peer beside 1 busy process, batch 1"] == PASS
    assert found["1.3b: at most 2.2 times its quiet time beside 1 busy process, batch 1"] == SHORT
    assert found["125m: 1.2 times the fastest peer beside 1 busy process, batch 4"] == UNKNOWN


def test_claims_with_planted_zeros():
    ours, peer = decoded("openvino-f16-f32", "ours-f16", 0.1), decoded("openvino-f16-f32", "openvino-f16-f32", 0.149)
    found = {claim.text: claim.verdict for claim in check(Records([ours, peer]), zeros=0.9)}
    assert found["1.3b: 1.5 times the fastest peer with 16-bit weights, 90% zeros, batch 1"] == SHORT


@pytest.mark.parametrize("options", [["--zeros", "0.3"], ["--busy", "-1"]])
def test_conditions_are_checked(options, capsys):
    with pytest.raises(SystemExit):
        parse([*TINY, *options])
    assert f"{options[0]} {options[1]}" in capsys.readouterr().err
