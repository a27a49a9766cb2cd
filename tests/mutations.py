"""Changed copies of a file's bytes, for tests that no change of a file is silent."""

from hypothesis import strategies as st


def mutations(content):
    """A strategy of bytes that differ from `content`.

    One byte is another, two are swapped, or a piece is lost, put in, appended or zeroed.
    """
    # Anywhere in the file, though hypothesis prefers small numbers.
    at = st.integers(0, 2**32 - 1).map(lambda n: n * 0x9E3779B1 % 2**32 * len(content) >> 32)
    part = st.tuples(at, at).map(lambda pair: (min(pair), max(pair) + 1))
    xor = st.integers(1, 255) | st.sampled_from([1 << n for n in range(8)])
    piece = st.binary(min_size=1, max_size=9)

    def other(i, x):
        return content[:i] + bytes([content[i] ^ x]) + content[i + 1 :]

    def swapped(i, j):
        changed = bytearray(content)
        changed[i], changed[j] = content[j], content[i]
        return bytes(changed)

    changes = st.one_of(
        st.builds(other, at, xor),
        st.builds(swapped, at, at),
        at.map(lambda i: content[:i]),
        part.map(lambda ij: content[: ij[0]] + content[ij[1] :]),
        part.map(lambda ij: content[: ij[0]] + bytes(ij[1] - ij[0]) + content[ij[1] :]),
        st.builds(lambda i, new: content[:i] + new + content[i:], at, piece),
        piece.map(lambda new: content + new),
    )
    return changes.filter(lambda changed: changed != content)
