"""The hash of a file is that of hashlib, whatever its size."""

import hashlib

from optimum_opt_trn.checkpoint.listing import sha256_file


def test_hash_of_a_file(tmp_path):
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        content = bytes(range(256)) * (size // 256 + 1)
        (tmp_path / "file").write_bytes(content[:size])
        seen: list[int] = []
        assert sha256_file(tmp_path / "file", seen.append) == hashlib.sha256(content[:size]).hexdigest()
        assert sum(seen) == size
