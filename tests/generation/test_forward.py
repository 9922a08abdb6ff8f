"""One call of the model: logits, loss and cache as transformers', and the form that optimum-neuron's callers use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_transformers import TOLERANCE, pair, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, OPTForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_opt_trn.model.sampling import sample_tokens


def alone(reference: OPTForCausalLM, row: list[int]) -> Tensor:
    """transformers' logits of a row without padding, float32 `(tokens, vocabulary)`."""
    with torch.no_grad():
        return reference(torch.tensor([row])).logits[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("kind", ["pre_norm", "post_norm"])
def test_logits_of_every_position_and_of_the_last(kind, tp_degree):
    ours, reference = pair(kind, tp_degree, 3)
    inputs = ragged([7, 2, 5])
    out = ours(**inputs)
    assert isinstance(out, CausalLMOutputWithPast) and isinstance(out.past_key_values, Cache) and out.loss is None
    assert out.logits.dtype == torch.float32 and out.logits.shape == (3, 7, 128)
    with torch.no_grad():
        theirs = reference(**inputs).logits
    real = inputs["attention_mask"].bool()
    close(out.logits[real], theirs[real])
    assert out.logits[~real].eq(0).all()
    for count in (1, 2, 4):
        last = ours(**inputs, logits_to_keep=count).logits
        assert last.shape == (3, count, 128)
        counted = real[:, -count:]
        close(last[counted], theirs[:, -count:][counted])
        assert last[~counted].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_turns_of_any_lengths_are_the_row_alone(data):
    """Several calls, each with a different number of new tokens a row, padded at either side or holed."""
    ours, reference = pair("pre_norm", 1, 3)
    rows = data.draw(st.integers(1, 3))
    histories: list[list[int]] = [[] for _ in range(rows)]
    past, whole = None, torch.zeros(rows, 0, dtype=torch.long)
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.integers(1, 6))
        masks = st.lists(st.integers(0, 1), min_size=width, max_size=width).filter(any)
        mask = torch.tensor(data.draw(st.lists(masks, min_size=rows, max_size=rows)))
        ids = torch.randint(4, 128, (rows, width), generator=torch.Generator().manual_seed(width))
        whole = torch.cat([whole, mask], dim=1)
        keep = data.draw(st.sampled_from([0, 1, 2]))
        out = ours(ids, whole, past_key_values=past, logits_to_keep=keep)
        past = out.past_key_values
        assert past.get_seq_length() == whole.shape[1]
        for row in range(rows):
            new = ids[row, mask[row].bool()].tolist()
            histories[row] += new
            expected = alone(reference, histories[row])[-len(new) :]
            mine = out.logits[row, -min(keep, len(new)) :] if keep else out.logits[row, mask[row].bool()]
            close(mine, expected[-len(mine) :])


def test_a_conversation_as_transformers_has_it():
    ours, reference = pair("untied", 2, 3)
    past, theirs_past = None, None
    mask = torch.zeros(3, 0, dtype=torch.long)
    for turn in range(4):
        inputs = ragged([3, 1, 2] if turn == 0 else [2, 2, 2], seed=turn)
        mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
        ids = inputs["input_ids"]
        out = ours(ids, attention_mask=mask, past_key_values=past, logits_to_keep=1)
        with torch.no_grad():
            theirs = reference(ids, attention_mask=mask, past_key_values=theirs_past)
        past, theirs_past = out.past_key_values, theirs.past_key_values
        close(out.logits[:, -1], theirs.logits[:, -1])
        assert past.get_seq_length() == theirs_past.get_seq_length()
    past.crop(4 - past.get_seq_length())
    theirs_past.crop(4 - theirs_past.get_seq_length())
    again = torch.full((3, 2), 9)
    with torch.no_grad():
        theirs = reference(again, attention_mask=mask[:, :6], past_key_values=theirs_past).logits
    close(ours(again, mask[:, :6], past_key_values=past).logits, theirs)


# A call that goes on with a cache of 4 columns, whose mask forgets the last of them, and one thing that is wrong.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an id": ({"input_ids": torch.tensor([[9, 10], [9, 500]])}, "Token id 500"),
    "too long": (
        {"input_ids": torch.full((2, 62), 9), "attention_mask": torch.tensor([[0, 0, 1, 0] + [1] * 62] * 2)},
        "A row of 63 tokens.*62",
    ),
    "an empty row": ({"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0]])}, "row 1 is empty"),
    "a narrow mask": (
        {"attention_mask": torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])},
        r"\(2, 4\), but.* make \(2, 6\)",
    ),
    "new columns' mask": ({"attention_mask": torch.ones(2, 2)}, r"\(2, 2\), but.* make \(2, 6\)"),
    "a token behind": ({"attention_mask": torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 1, 0, 1, 1]])}, "mask differs"),
    "another column": ({"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]])}, "mask differs"),
    "positions": ({"position_ids": torch.tensor([[3, 4], [4, 5]])}, "position_ids differ"),
    "cache_position": ({"cache_position": torch.tensor([3, 4])}, "does not follow the 4 columns"),
    "labels": ({"labels": torch.tensor([[9]])}, "labels has shape"),
    "logits_to_keep": ({"logits_to_keep": -1}, "logits_to_keep=-1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_refused_call_forgets_nothing(case):
    ours, reference = pair("pre_norm", 1, 3, 62)
    first, mask = torch.tensor([[1, 5, 6, 7], [11, 12, 13, 14]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    past = ours(first, mask).past_key_values
    new = {"input_ids": torch.tensor([[9, 10], [9, 10]]), "past_key_values": past}
    shrunk = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]])
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ours(**{**new, "attention_mask": shrunk, **arguments})
    whole = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], dim=1)
    logits = ours(**new, attention_mask=whole).logits
    close(logits[0], alone(reference, [5, 6, 7, 9, 10])[3:])
    close(logits[1], alone(reference, [11, 12, 13, 14, 9, 10])[4:])
    # And the call as it should have been.
    past.crop(-2)
    logits = ours(**new, attention_mask=shrunk, position_ids=torch.tensor([[2, 3], [3, 4]])).logits
    close(logits[0], alone(reference, [5, 6, 9, 10])[2:])
    close(logits[1], alone(reference, [11, 12, 13, 9, 10])[3:])


def test_forgotten_tokens_take_no_room():
    ours, reference = pair("pre_norm", 1, 3, 62)
    row = [*range(4, 64)]
    past = ours(torch.tensor([row])).past_key_values
    mask = torch.tensor([[1] * 40 + [0] * 20 + [1] * 22])
    logits = ours(torch.tensor([row[-22:]]), mask, past_key_values=past).logits
    close(logits[0], alone(reference, row[:40] + row[-22:])[40:])


@pytest.mark.parametrize("lengths", [[6], [3, 6]])
def test_loss_is_that_of_transformers(lengths):
    ours, reference = pair("pre_norm", 2, 3)
    inputs = {name: tensor.flip(1) for name, tensor in ragged(lengths).items()}  # padded at the right
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[0, 2] = -100
    out = ours(**inputs, labels=labels)
    with torch.no_grad():
        theirs = reference(**inputs, labels=labels)
    assert abs(out.loss - theirs.loss) < 1e-4 * theirs.loss
    assert isinstance(ours(**inputs, labels=labels, return_dict=False)[0], Tensor)


def test_labels_that_nothing_predicts():
    ours, _ = pair("pre_norm", 1, 3)
    inputs = ragged([3, 6])
    with pytest.raises(ValueError, match="labels count columns.*-100"):
        ours(**inputs, labels=inputs["input_ids"])
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    with pytest.raises(ValueError, match="pad at the right"):
        ours(**inputs, labels=labels)
    labels[0, 3] = -100
    assert ours(**inputs, labels=labels).loss > 0
    with pytest.raises(ValueError, match=r"labels has shape \(2, 5\), but input_ids \(2, 6\)"):
        ours(**inputs, labels=labels[:, 1:])


def test_what_is_returned():
    ours, _ = pair("pre_norm", 1, 3)
    ids = torch.tensor([[5, 6, 7]])
    assert ours(ids, use_cache=False).past_key_values is None
    logits, past = ours(ids, return_dict=False)
    assert logits.shape == (1, 3, 128) and past.get_seq_length() == 3
    grown = ours(ids, past_key_values=past).past_key_values
    assert grown is past and past.get_seq_length() == 6


def test_positions_may_but_confirm():
    ours, _ = pair("pre_norm", 1, 3)
    inputs = ragged([2, 4])
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=1)
    positions = torch.where(inputs["attention_mask"] == 0, 1, inputs["attention_mask"].cumsum(-1) - 1)
    past = ours(**inputs, position_ids=positions, cache_position=torch.arange(4)).past_key_values
    new, mask = torch.tensor([[9], [9]]), torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    call = {"input_ids": new, "attention_mask": mask, "past_key_values": past}
    with pytest.raises(ValueError, match="position_ids differ"):
        ours(**call, position_ids=torch.tensor([[4], [4]]))
    with pytest.raises(ValueError, match=r"cache_position=\[0\] does not follow the 4 columns"):
        ours(**call, cache_position=torch.arange(1))
    assert past.get_seq_length() == 4
    ours(**call, position_ids=torch.tensor([[2], [4]]), cache_position=torch.tensor([4]))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "embeddings as well": ({"inputs_embeds": torch.zeros(1, 2, 64)}, ValueError, "either input_ids or inputs_embeds"),
    "head mask": ({"head_mask": torch.ones(4)}, NotImplementedError, "head_mask"),
    "seq_ids alone": ({"seq_ids": torch.tensor([0])}, ValueError, "seq_ids goes with sampling_params"),
    "another cache": ({"past_key_values": "mine"}, ValueError, "past_key_values is a str"),
    "mask": ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask has shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_any_work(case, monkeypatch):
    ours, _ = pair("pre_norm", 1, 3)
    held = ours(torch.tensor([[5], [6], [7]])).past_key_values
    arguments, kind, message = REFUSED[case]
    for work in ("step", "copy"):
        monkeypatch.setattr(ours.runtime, work, lambda *_: pytest.fail("the device was called"))
    with pytest.raises(kind, match=message):
        ours(torch.tensor([[5, 6]]), **arguments)
    held.check(ours.engine)


def test_caches_of_others():
    ours, reference = pair("pre_norm", 1, 3)
    ids = torch.tensor([[5, 6, 7]])
    close(ours(ids, past_key_values=DynamicCache()).logits, ours(ids).logits)
    filled = reference(ids).past_key_values
    with pytest.raises(ValueError, match="DynamicCache, whose keys and values are not on the device"):
        ours(ids, past_key_values=filled)
    past = ours(torch.tensor([[5], [6]])).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows, and input_ids has 1"):
        ours(ids, past_key_values=past)
    with pytest.raises(ValueError, match="4 more rows do not fit the batch_size=3"):
        ours(ids.repeat(4, 1), past_key_values=DynamicCache())


def test_an_interrupted_call_leaves_its_cache_as_it_was(monkeypatch):
    ours, reference = pair("pre_norm", 2, 3)
    past = ours(torch.tensor([[5, 6, 7]])).past_key_values
    step = ours.runtime.step

    def interrupted(*arguments: Any) -> Any:
        step(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ours.runtime, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ours(torch.tensor([[44, 45]]), past_key_values=past)
    assert past.get_seq_length() == 3
    close(ours(torch.tensor([[8, 9]]), past_key_values=past).logits[0], alone(reference, [5, 6, 7, 8, 9])[3:])


# The form of optimum-neuron's callers: slots, positions, three parameters a row.


class Server:
    """What optimum-neuron's vLLM runner does with a model: a slot for each request, prompts while others decode."""

    def __init__(self, model: Any, greedy: bool = True):
        self.model, self.greedy = model, greedy
        self.requests: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}

    def _call(self, slots: list[int], rows: list[list[int]], positions: list[list[int]]) -> None:
        width = max(map(len, rows))
        padded = [[part + [0] * (width - len(part)) for part in parts] for parts in (rows, positions)]
        params = torch.tensor([[1.0, 1.0, 1.0] if self.greedy else [30.0, 0.9, 1.3]] * len(rows))
        tokens = self.model(
            input_ids=torch.tensor(padded[0]),
            position_ids=torch.tensor(padded[1]),
            seq_ids=torch.tensor(slots),
            sampling_params=params,
        )
        assert isinstance(tokens, Tensor) and tokens.shape == (len(rows),) and tokens.dtype == torch.int32
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self.requests[slot].append(token)

    def prefill(self, prompts: dict[int, list[int]]) -> None:
        self.requests.update({slot: list(prompt) for slot, prompt in prompts.items()})
        self.prompts.update({slot: len(prompt) for slot, prompt in prompts.items()})
        self._call([*prompts], [*prompts.values()], [[*range(len(p))] for p in prompts.values()])

    def decode(self, slots: list[int]) -> None:
        ends = [self.requests[slot] for slot in slots]
        self._call(slots, [row[-1:] for row in ends], [[len(row) - 1] for row in ends])


@pytest.mark.parametrize("tp_degree", [1, 2])
def test_prompts_come_while_others_decode(tp_degree):
    ours, reference = pair("post_norm", tp_degree, 4)
    server = Server(ours)
    server.prefill({2: [5, 6, 7, 8], 0: [9, 10]})
    server.decode([0, 2])
    server.decode([2])
    server.prefill({3: [11, 12, 13], 1: [14]})
    for _ in range(4):
        server.decode([3, 0, 2, 1])
    first = server.requests.pop(2)
    server.prefill({2: [21, 22, 23, 24, 25, 26, 27]})  # another request in a slot that was used
    for _ in range(5):
        server.decode([0, 1, 2, 3])
    for row, prompt in [(first, 4), *((server.requests[s], server.prompts[s]) for s in range(4))]:
        for model in (ours, reference):
            options = {"max_new_tokens": len(row) - prompt, "eos_token_id": None, "pad_token_id": 1}
            assert model.generate(torch.tensor([row[:prompt]]), **options)[0].tolist() == row


def test_several_new_tokens_at_once():
    """As optimum-neuron's speculation validates candidates."""
    ours, reference = pair("pre_norm", 1, 3)
    row = [5, 6, 7, 8, 9, 10]
    greedy = torch.tensor([[1.0, 1.0, 1.0]])
    slot = torch.tensor([1])
    ours(torch.tensor([row[:2]]), position_ids=torch.arange(2)[None], seq_ids=slot, sampling_params=greedy)
    token = ours(torch.tensor([row[2:]]), position_ids=torch.arange(2, 6)[None], seq_ids=slot, sampling_params=greedy)
    assert int(token) == int(alone(reference, row)[-1].argmax())


def test_drawn_tokens_follow_the_seed_and_the_parameters():
    ours, reference = pair("pre_norm", 2, 4)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        server = Server(ours, greedy=False)
        server.prefill({0: [5, 6, 7], 1: [8, 9]})
        for _ in range(6):
            server.decode([0, 1])
        results.append(dict(server.requests))
    assert results[0] == results[1]
    torch.manual_seed(5)
    params = torch.tensor([[30, 0.9, 1.3, 0.0]] * 2)
    nothing = torch.full((2, 8), -1, dtype=torch.int32)
    first = torch.stack([alone(reference, row)[-1] for row in ([5, 6, 7], [8, 9])])
    expected = sample_tokens(first, params, torch.rand(2), nothing, 256)
    assert [results[0][0][3], results[0][1][2]] == expected.tolist()


SLOTTED: dict[str, tuple[dict[str, Any], str]] = {
    "a slot twice": ({"seq_ids": torch.tensor([1, 1])}, r"seq_ids=\[1, 1\] must be 2 different slots.*0 to 2"),
    "no such slot": ({"seq_ids": torch.tensor([0, 3])}, "seq_ids"),
    "no positions": ({"position_ids": None}, "position_ids must have the shape"),
    "positions' shape": (
        {"position_ids": torch.zeros(2, 1)},
        r"position_ids must have the shape of input_ids, \(2, 2",
    ),
    "params' shape": ({"sampling_params": torch.ones(1, 3)}, r"sampling_params has shape \(1, 3\), not \(2, 3\)"),
    "too far": ({"position_ids": torch.tensor([[63, 64], [0, 1]])}, "0 to 63"),
    "before the start": ({"position_ids": torch.tensor([[-1, 0], [0, 1]])}, "position_ids go from 0"),
    "an id": ({"input_ids": torch.tensor([[5, 500], [5, 6]])}, "Token id 500"),
}


@pytest.mark.parametrize("case", SLOTTED)
def test_slots_that_do_not_fit(case):
    ours, _ = pair("pre_norm", 1, 3)
    good = {
        "input_ids": torch.tensor([[5, 6], [7, 8]]),
        "position_ids": torch.tensor([[0, 1], [0, 1]]),
        "seq_ids": torch.tensor([0, 2]),
        "sampling_params": torch.ones(2, 3),
    }
    held = ours(torch.tensor([[5], [6], [7]])).past_key_values
    arguments, message = SLOTTED[case]
    with pytest.raises(ValueError, match=message):
        ours(**{**good, **arguments})
    held.check(ours.engine)
    ours(**good)
    with pytest.raises(ValueError, match="lost its slots"):
        held.check(ours.engine)


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("rows", [4, 7])
def test_more_rows_than_slots_run_in_batches(rows, keep, tp_degree):
    ours, reference = pair("pre_norm", tp_degree, 3)
    inputs = ragged([2 + row for row in range(rows)])
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    # The first label that counts would be predicted by padding.
    labels[torch.arange(rows), inputs["attention_mask"].argmax(-1)] = -100
    with torch.no_grad():
        expected = reference(**inputs, labels=labels)
    real = inputs["attention_mask"].bool()
    got = ours(**inputs, labels=labels) if keep == 0 else ours(**inputs, logits_to_keep=keep)
    wanted, real = (expected.logits, real) if keep == 0 else (expected.logits[:, -keep:], real[:, -keep:])
    torch.testing.assert_close(got.logits[real], wanted[real], atol=1e-3, rtol=1e-4)
    assert got.past_key_values is None
    if keep == 0:
        torch.testing.assert_close(got.loss, expected.loss, atol=1e-4, rtol=1e-4)


def test_more_rows_than_slots_have_no_cache():
    ours, _ = pair("pre_norm", 1, 3)
    ids = torch.full((4, 5), 9)
    with pytest.raises(ValueError, match="4 rows do not fit the batch_size=3.*at most 3 rows.*in batches"):
        ours(ids, use_cache=True)
    past = ours(ids[:3]).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 3 rows, and input_ids has 4"):
        ours(ids, past_key_values=past)
    assert ours(ids[:3], past_key_values=past).past_key_values.get_seq_length() == 10
