import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.data.documents import cut_points, is_heldout


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(4, 40))
def test_pieces_join_to_the_text_and_each_is_short_enough_and_valid_unicode(text, max_bytes):
    data = text.encode()
    ends = cut_points(data, max_bytes)
    pieces = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(len(piece) <= max_bytes for piece in pieces)
    assert all(pieces) or not data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aaaaaaa\nbb cc", ["aaaaaaa\n", "bb cc"]),
        ("aaaaaaa bbbbbb", ["aaaaaaa ", "bbbbbb"]),
        ("aaaaaaaaaaaaaa", ["aaaaaaaaaa", "aaaa"]),
        ("a aaaaaaaaaaaaa", ["a aaaaaaaa", "aaaaa"]),
        ("ééééééé", ["ééééé", "éé"]),
        ("aééééééé", ["aéééé", "ééé"]),
    ],
)
def test_cut_prefers_a_newline_then_a_space_then_any_character(text, expected):
    data = text.encode()
    ends = cut_points(data, 10)
    assert [data[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)] == expected


def test_heldout_share_is_the_fraction_and_grows_with_it():
    texts = [f"document {i}" for i in range(4000)]
    small = {text for text in texts if is_heldout(text, 0.1)}
    large = {text for text in texts if is_heldout(text, 0.3)}
    assert 300 < len(small) < 500
    assert small < large
