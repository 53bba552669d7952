"""An even spread of items."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emulus.data.source import even


def test_even_spread() -> None:
    assert even(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert even([1, 2], 5) == [1, 2]
    assert even([], 3) == []
    assert even([1, 2], 0) == []


@given(st.integers(0, 300), st.integers(0, 50))
def test_neighbours_are_equally_far_apart(items: int, count: int) -> None:
    chosen = even(range(items), count)
    assert len(chosen) == min(items, count)
    steps = {later - earlier for earlier, later in zip(chosen, [*chosen[1:], items], strict=False)}
    assert steps <= {items // max(len(chosen), 1), -(-items // max(len(chosen), 1))}
    assert not chosen or chosen[0] == 0
