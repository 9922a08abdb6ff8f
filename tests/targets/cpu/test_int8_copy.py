"""Copies of matrices in int8, and how far products with them can be off, against float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.dtypes import to_torch
from optimum_opt_trn.targets.cpu.int8_copy import copy_specs, int8_copy


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 40), st.integers(1, 900), st.integers(1, 700), st.sampled_from([0.01, 1.0, 30.0]))
def test_how_far_a_copy_can_be_off(data, m, rows, columns, outlier):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    matrix = torch.randn(rows, columns, generator=generator)
    matrix[:, 0] *= outlier
    matrix = matrix.to(data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])))
    matrix[data.draw(st.integers(0, rows - 1))] = 0
    copy = int8_copy(matrix)
    for tensor, spec in zip(vars(copy).values(), copy_specs("name", rows, columns).values(), strict=True):
        assert tensor.shape == spec.shape and tensor.dtype == to_torch(spec.dtype)
    exact, scale = matrix.double().numpy(), copy.scale.double().numpy()
    near = copy.weight.double().numpy() * scale
    assert copy.weight.dtype == torch.int8 and (np.abs(near - exact) <= scale / 2 * (1 + 1e-4)).all()
    for kept, difference in ((copy.error, exact - near), (copy.length, exact)):
        length, kept = np.linalg.norm(difference, axis=1), kept.double().numpy()
        assert (kept >= length).all()
        assert (kept <= length * (1 + 2e-4) + 1e-6 * np.linalg.norm(exact, axis=1)).all()
    x = torch.randn(m, columns, generator=generator)
    # What kernels compute, in float32 and with factors that are rounded to bfloat16.
    for rounded, factor in ((False, x), (True, x.bfloat16().float())):
        results, nears = factor @ matrix.float().T, factor @ (copy.weight * copy.scale).T
        reach = copy.bounds(rounded).double().numpy() * np.linalg.norm(x.double().numpy(), axis=1)[:, None]
        assert (np.abs(x.double().numpy() @ exact.T - nears.numpy()) <= reach).all()
        assert (np.abs(results.numpy() - x.double().numpy() @ near.T) <= reach).all()


def test_rows_of_a_copy():
    matrix = torch.randn(9, 5)
    part, expected = int8_copy(matrix).rows(2, 6), int8_copy(matrix[2:6])
    assert all(torch.equal(a, b) for a, b in zip(vars(part).values(), vars(expected).values(), strict=True))
