"""Damage to files, as a hypothesis strategy: flipped bits, cuts, and what breaks readers."""

from hypothesis import strategies as st


# Numbers that break readers: sizes and offsets beyond the file, and values that overflow.
NUMBERS = [0, 1, 8, 127, 255, 2**15, 2**31 - 1, 2**32, 2**53, 2**62, 2**63 - 1]
WORDS = [
    b"..",
    b"/",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"-1",
    b"1e999",
    b"\0",
    b"\xff\xff\xff\xff",
    b"F64",
    b"I8",
]


@st.composite
def damage(draw):
    """A function from bytes to other bytes."""
    where = draw(st.floats(0, 1, exclude_max=True) | st.integers(0, 400))
    piece = draw(
        st.sampled_from(WORDS)
        | st.sampled_from(NUMBERS).map(lambda number: number.to_bytes(8, "little"))
        | st.sampled_from(NUMBERS).map(lambda number: str(number).encode())
        | st.binary(min_size=1, max_size=8)
    )
    kind = draw(st.sampled_from(["flip", "overwrite", "insert", "cut", "truncate", "repeat"]))
    bit = draw(st.integers(0, 7))

    def apply(content: bytes) -> bytes:
        position = int(where * len(content)) if isinstance(where, float) else min(where, max(0, len(content) - 1))
        before, after = content[:position], content[position:]
        return {
            "flip": before + bytes([after[0] ^ (1 << bit)]) + after[1:] if after else content,
            "overwrite": before + piece + after[len(piece) :],
            "insert": before + piece + after,
            "cut": before + after[len(piece) :],
            "truncate": before,
            "repeat": before + after[:64] + after,
        }[kind]

    return apply
