"""Sharding rules and collectives: any number of ranks, held in one place or spread, gives what one rank gives."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, tiny_opt
from torch import Tensor

from optimum_opt_trn.model.parallel import SHARD_DIMS, RankGroup, shard_dim, shard_range


WORLDS = [1, 2, 4]
sizes = st.integers(1, 9)
seeds = st.integers(0, 1000)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shards(tensor: Tensor, dim: int, world: int, ranks: range) -> list[Tensor]:
    """Equal parts, the last ones padded with zeros; written apart from the loader's own cutting."""
    part = -(-tensor.shape[dim] // world)
    padding = [0, 0] * (tensor.dim() - 1 - dim) + [0, part * world - tensor.shape[dim]]
    return [F.pad(tensor, padding).split(part, dim)[rank] for rank in ranks]


class Processes:
    """A world of `count` processes, as threads, with collectives between them."""

    def __init__(self, count: int):
        self.count = count
        self._barrier = Barrier(count, timeout=30)
        self._posts: dict[int, Tensor] = {}

    def _exchange(self, process: int, tensor: Tensor) -> list[Tensor]:
        self._posts[process] = tensor
        self._barrier.wait()
        posts = [self._posts[p] for p in range(self.count)]
        self._barrier.wait()
        return posts

    def groups(self, world: int) -> list[RankGroup]:
        local = world // self.count
        return [
            RankGroup(
                tp_degree=world,
                ranks=range(p * local, (p + 1) * local),
                all_reduce=lambda t, p=p: torch.stack(self._exchange(p, t)).sum(0),
                all_gather=lambda t, p=p: torch.cat(self._exchange(p, t), dim=-1),
            )
            for p in range(self.count)
        ]

    def run(self, function, world: int) -> list[Tensor]:
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(function, self.groups(world)))


def every_way(function, world: int) -> list[Tensor]:
    """Results of `function(group)` with all ranks in one place, and on 2 and `world` processes."""
    results = [function(RankGroup(tp_degree=world, ranks=range(world)))]
    for count in {2, world} if world > 1 else set():
        results += Processes(count).run(function, world)
    return results


@pytest.mark.parametrize("world", WORLDS)
@settings(deadline=None, max_examples=8)
@given(seeds, sizes, sizes, sizes, st.booleans())
def test_column_parallel_is_the_dense_product(world, seed, rows, n_in, part, with_bias):
    x, weight = random(seed, 2, rows, n_in), random(seed + 1, part * world, n_in)
    bias = random(seed + 2, part * world) if with_bias else None

    def product(group: RankGroup) -> Tensor:
        biases = None if bias is None else shards(bias, 0, world, group.ranks)
        outputs = group.arithmetic.linears(x, shards(weight, 0, world, group.ranks), biases)
        assert [tuple(y.shape) for y in outputs] == [(2, rows, part)] * len(group.ranks)
        return group.gather(outputs)

    for y in every_way(product, world):
        torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@settings(deadline=None, max_examples=8)
@given(seeds, sizes, sizes, sizes, st.booleans())
def test_row_parallel_is_the_dense_product_with_one_bias_and_residual(world, seed, rows, n_out, part, with_bias):
    x, weight = random(seed, 2, rows, part * world), random(seed + 1, n_out, part * world)
    # Large, so that what every rank adds could not be missed.
    bias = 100 + random(seed + 2, n_out) if with_bias else None
    residual = 1000 + random(seed + 3, 2, rows, n_out)

    def product(group: RankGroup) -> Tensor:
        inputs = shards(x, 2, world, group.ranks)
        biases = None if bias is None else [bias]
        return group.row(inputs, shards(weight, 1, world, group.ranks), biases, residual)

    for y in every_way(product, world):
        torch.testing.assert_close(y, F.linear(x, weight, bias) + residual, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("world", WORLDS)
@settings(deadline=None, max_examples=8)
@given(seeds, st.integers(1, 40), sizes, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_embedding_is_the_look_up(world, seed, words, dim, dtype):
    table = random(seed, words, dim, dtype=dtype)
    ids = torch.arange(words, dtype=torch.int32).repeat(2, 1)

    def look_up(group: RankGroup) -> Tensor:
        ranks = torch.tensor(list(group.ranks), dtype=torch.int32)
        return group.embedding(ids, shards(table, 0, world, group.ranks), ranks)

    for rows in every_way(look_up, world):
        assert rows.dtype == torch.float32
        assert torch.equal(rows, F.embedding(ids, table).float())


@pytest.mark.parametrize("world", WORLDS)
def test_sum_and_gather(world):
    parts = [random(rank, 3, 5) for rank in range(world)]
    for total in every_way(lambda group: group.sum([parts[rank] for rank in group.ranks]), world):
        torch.testing.assert_close(total, torch.stack(parts).sum(0))
    for joined in every_way(lambda group: group.gather([parts[rank] for rank in group.ranks]), world):
        assert torch.equal(joined, torch.cat(parts, -1))


def test_a_rank_without_its_weight_is_an_error():
    group = RankGroup(tp_degree=2, ranks=(0, 1))
    weight = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="shorter"):
        group.row([torch.zeros(1, 4)] * 2, [weight], None, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="shorter"):
        group.arithmetic.linears(torch.zeros(1, 4), [weight] * 2, [torch.zeros(3)])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60000), st.integers(1, 64))
def test_ranges_tile_exactly(size, world):
    ranges = [shard_range(size, rank, world) for rank in range(world)]
    parts = {stop - start + padding for start, stop, padding in ranges}
    assert len(parts) == 1  # of equal size, padding included
    assert parts.pop() * world - size == sum(padding for _, _, padding in ranges) < world
    covered = [i for start, stop, _ in ranges for i in (start, stop)]
    assert covered == sorted(covered)
    assert (covered[0], covered[-1]) == (0, size)
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    # Real words keep their ids: a rank begins at rank * part, which `embedding` counts on.
    part = -(-size // world)
    assert all(start == rank * part for rank, (start, stop, _) in enumerate(ranges) if stop > start)
    if size % world == 0:
        assert all(padding == 0 for _, _, padding in ranges)


@pytest.mark.parametrize("kind", KINDS)
def test_sharding_table_covers_transformers_opt(kind):
    """Every linear layer's and embedding's tensor is cut as Megatron does it, and nothing else is."""
    column = {"q_proj", "k_proj", "v_proj", "fc1", "lm_head", "embed_tokens"}
    row = {"out_proj", "fc2"}
    shared = {"embed_positions", "project_in", "project_out", "self_attn_layer_norm", "final_layer_norm"}
    used = set()
    for name, tensor in tiny_opt(**KINDS[kind]).state_dict().items():
        module, part = name.split(".")[-2:]
        assert module in column | row | shared
        if module in column:
            expected = 0
        elif module in row and part == "weight":
            expected = 1
        else:
            expected = None
        assert shard_dim(name) == expected, name
        assert expected is None or expected < tensor.dim()
        used |= {end for end in SHARD_DIMS if name.endswith(end)}
    scales = {end for end in SHARD_DIMS if end.endswith("_scale")}
    # The scale of an output channel goes where the channel goes.
    weights = {end for end in SHARD_DIMS if end.endswith("_proj.weight") or end in ("fc1.weight", "lm_head.weight")}
    assert scales == {f"{end}_scale" for end in weights if SHARD_DIMS[end] == 0}
    assert all(SHARD_DIMS[end] == 0 for end in scales)
    if KINDS[kind].get("enable_bias", True):
        assert used == set(SHARD_DIMS) - scales  # no rule is for nothing
