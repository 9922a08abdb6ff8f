"""What manifests of compiled artifacts have in common."""

from __future__ import annotations

import hashlib
from pathlib import Path


MANIFEST_NAME = "manifest.json"


def sha256(file: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
