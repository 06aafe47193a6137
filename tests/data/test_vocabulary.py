"""Vocabularies, against examples worked by hand and plain loops."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedexp.data.vocabulary import Vocabulary, fill_rows, read_tag_counts, read_word_counts
from fedexp.errors import UserError


def test_ids_are_numbered_as_in_tensorflow_federated():
    vocabulary = Vocabulary(tuple(f"w{i}" for i in range(10_000)))
    assert (vocabulary.pad, vocabulary.oov, vocabulary.bos, vocabulary.eos) == (
        0,
        10001,
        10002,
        10003,
    )
    assert vocabulary.ids[b"w0"] == 1
    assert vocabulary.ids[b"w9999"] == 10_000
    assert vocabulary.size == 10_004


def test_sentences_worked_by_hand():
    # a 1, b 2, c 3, outside 4, begin 5, end 6.
    encode = Vocabulary(("a", "b", "c")).encode
    sentences = [b"c a", b"a b c", b"a b c a", b"a zebra", b"", b"a  b", "ä".encode()]
    expected = [
        [5, 3, 1, 6],
        [5, 1, 2, 3],  # Exactly as long: no room for the end.
        [5, 1, 2, 3],  # Cut.
        [5, 1, 4, 6],
        [5, 4, 6, 0],  # A single empty word, as tf.strings.split(sep=' ') has it.
        [5, 1, 4, 2],
        [5, 4, 6, 0],
    ]
    found = encode(sentences, 3)
    assert found.tolist() == expected
    assert found.dtype == np.uint16
    assert encode([b"a b c"], 1).tolist() == [[5, 1]]
    assert encode([], 3).shape == (0, 4)


@given(st.lists(st.text("ab c", max_size=12), max_size=6), st.integers(1, 6))
def test_encoding_equals_a_plain_loop(sentences, length):
    ids = {"a": 1, "b": 2}
    expected = []
    for sentence in sentences:
        row = [4] + [ids.get(word, 3) for word in sentence.split(" ")] + [5]
        row = row[: length + 1]
        expected.append(row + [0] * (length + 1 - len(row)))
    found = Vocabulary(("a", "b")).encode([sentence.encode() for sentence in sentences], length)
    assert found.tolist() == expected


def test_large_vocabularies_are_stored_in_int32():
    words = tuple(map(str, range((1 << 16) - 3)))
    assert Vocabulary(words[:-1]).dtype == np.uint16
    large = Vocabulary(words).encode([words[-1].encode()], 2)
    assert large.dtype == np.int32
    assert large.tolist() == [[65535, 65533, 65536]]


def test_fill_rows():
    rows = fill_rows(iter([1, 2, 3]), np.array([2, 0, 1]), 2, np.int16, fill=-1)
    assert rows.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert rows.dtype == np.int16


def test_word_counts_are_taken_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "stackoverflow.word_count"
    path.write_text("the 9\n. 9\ni 7\nto 8\n")
    assert read_word_counts(path, 3) == ("the", ".", "i")
    with pytest.raises(UserError, match=r"word_count has 4 entries, 5 are asked for"):
        read_word_counts(path, 5)
    with pytest.raises(UserError, match="cannot read .*gone"):
        read_word_counts(tmp_path / "gone", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a 2\nb\n", "line 2: expected a word and its count, got 'b'"),
        ("a b c\n", "line 1"),
        ("a x\n", "line 1"),
        ("\nb 1\n", "line 1: .*got ''"),
        ("a 2\na 1\n", "has 'a' twice"),
    ],
)
def test_another_form_of_word_counts(tmp_path, content, message):
    (tmp_path / "w").write_text(content)
    with pytest.raises(UserError, match=message):
        read_word_counts(tmp_path / "w", 2)


def test_word_counts_that_are_not_text(tmp_path):
    (tmp_path / "w").write_bytes(b"\x80\x04\x95")
    with pytest.raises(UserError, match="cannot read"):
        read_word_counts(tmp_path / "w", 1)


def test_tags_are_ranked_by_count_and_then_by_the_order_of_the_file(tmp_path):
    path = tmp_path / "tags"
    path.write_text(json.dumps({"c": 1, "z": 5, "b": 7, "a": 5}))
    assert read_tag_counts(path, 3) == ("b", "z", "a")
    with pytest.raises(UserError, match="has 4 entries, 9 are asked for"):
        read_tag_counts(path, 9)
    for content in ("c 1", "[1, 2]", '{"a": "x"}', "[" * 200_000):
        path.write_text(content)
        with pytest.raises(UserError, match="expected JSON of the form {tag: count}"):
            read_tag_counts(path, 1)
    with pytest.raises(UserError, match="cannot read"):
        read_tag_counts(tmp_path / "gone", 1)
