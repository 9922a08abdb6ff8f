"""Damaged and foreign files, one kind after the other: each is read, or refused by an error that says why.

For longer than a test run: FUZZ_EXAMPLES=20000 pytest tests/faults/test_fuzz_targets.py
"""

import json
import os
from pathlib import Path

import fuzz_targets
import pytest
from damage import damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 30))

# What the fuzzers found: the target, and where in its JSON which value was no error that says why. It was a crash of
# another kind, or a reader that took all memory.
FOUND = [
    ("config.json", ["dtype"], "gloat16"),
    ("config.json of an export", ["dtype"], []),
    ("config.json", ["num_hidden_layers"], 2**40),
    ("generation_config.json", ["bos_token_id"], 2.0**63),
    ("manifest of compiled files", ["artifacts", "layer_000.safetensors"], None),
    ("tokenizer.json", ["post_processor", "special_tokens"], {}),
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    fuzz_targets.make_workspace(root)
    return root


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_the_sound_file_is_read(name, workspace):
    content = (workspace / fuzz_targets.TARGETS[name].file).read_bytes()
    assert fuzz_targets.run(name, content, workspace) is None


@pytest.mark.parametrize(("name", "place", "value"), FOUND)
def test_what_was_found(name, place, value, workspace):
    content = json.loads((workspace / fuzz_targets.TARGETS[name].file).read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert fuzz_targets.run(name, json.dumps(content).encode(), workspace) is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files(name, workspace, data):
    content = (workspace / fuzz_targets.TARGETS[name].file).read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        content = data.draw(damage())(content)
    fuzz_targets.run(name, content, workspace)


JSON = [name for name, target in fuzz_targets.TARGETS.items() if target.file.endswith(".json")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", JSON)
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sound_json_with_other_values(name, workspace, data):
    """A value somewhere in the file is another one, of any type."""
    content = json.loads((workspace / fuzz_targets.TARGETS[name].file).read_text())
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(json_values)
        break
    fuzz_targets.run(name, json.dumps(content).encode(), workspace)
