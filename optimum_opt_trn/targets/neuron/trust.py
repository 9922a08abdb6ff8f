"""Which compiled models may be loaded: TorchScript and NEFFs are code, which `torch.jit.load` and the device run.

Whoever writes an export's directory writes its manifest too, so the manifest says nothing about who made it. The hash
of each model that is compiled here is therefore recorded outside of exports, for this user: as the name of an empty
file in `optimum_opt_trn/compiled/` of `$XDG_STATE_HOME`, by default `~/.local/state`. A model whose hash is not there
is loaded only with `trust_remote_code=True`.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

# What this process compiled, for hosts where nothing can be recorded.
_compiled_here: set[str] = set()


def record_compiled(sha256: str) -> None:
    """Records a compiled model of this host by the hash of its file; a warning if that cannot be written."""
    _compiled_here.add(sha256)
    file = _record(sha256)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch()
    except OSError as error:
        logger.warning(
            f"That this model was compiled here could not be recorded ({error}): other processes load it only with "
            "trust_remote_code=True. Set XDG_STATE_HOME to a directory that can be written."
        )


def check_trusted(file: Path, sha256: str, trust_remote_code: bool) -> None:
    """Raises ValueError unless the compiled model `file`, of this hash, was compiled here or is trusted."""
    if trust_remote_code or sha256 in _compiled_here or _record(sha256).is_file():
        return
    raise ValueError(
        f"{file} is code (TorchScript, and NEFFs for the device) that was not compiled by this user on this host "
        f"({_record(sha256).parent} has no record of it), and loading runs it. If you trust whoever made it, pass "
        "trust_remote_code=True (--trust_remote_code); otherwise export the model again from its checkpoint, which is "
        f"only data: optimum-cli export neuron -m {file.parent.parent} …; or load it with eager=True, which runs "
        "nothing of it."
    )


def _record(sha256: str) -> Path:
    # A relative path is to be ignored: XDG Base Directory Specification.
    given = os.environ.get("XDG_STATE_HOME", "")
    state = Path(given) if os.path.isabs(given) else Path("~/.local/state").expanduser()
    return state / "optimum_opt_trn" / "compiled" / sha256
