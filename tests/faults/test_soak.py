"""A short soak: results repeat bit for bit, and nothing is left. Memory needs the long form, by soak.py."""

import logging

import pytest
from soak import soak


@pytest.mark.filterwarnings("ignore")
def test_calls_with_random_options_repeat_and_leave_nothing(tmp_path):
    logging.disable(logging.WARNING)
    try:
        result = soak(tmp_path, calls=200, seed=2)
    finally:
        logging.disable(logging.NOTSET)
    assert result.repeated == 10 and result.different == 0
    assert 0 < result.refused < result.calls / 2
    assert result.threads[1] <= result.threads[0] and result.handles[1] <= result.handles[0]
