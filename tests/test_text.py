"""Pieces of text from tokens as they come: together they are the text of all tokens."""

import numpy as np
import pytest

from moejax.config import DataConfig
from moejax.data.tokens import ByteTokenizer, open_tokenizer, train_tokenizer
from moejax.serve.text import TextStream

TEXT = "naïve 漢字 and 🙂🙃, then plain words: a few experts, and drop none\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Few merges, so that most characters beyond ASCII take several tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("a few experts and drop none, naïve words " * 30)
    train_tokenizer([str(folder / "text.txt")], 280, folder / "tokenizer.json", DataConfig())
    return open_tokenizer(str(folder / "tokenizer.json"), vocab_size=280)


def pieces(stream, ids, sizes):
    given, start = [], 0
    for size in sizes:
        given.append(stream.add(ids[start : start + size]))
        start += size
    return [*given, stream.add(ids[start:]), stream.finish()]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("size", [1, 3])
def test_pieces_are_the_text_and_never_half_a_character(kind, size, bpe):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT) / 2 and (kind == "bytes" or len(ids) < len(TEXT.encode()))
    given = pieces(TextStream(tokenizer), ids, [size] * (len(ids) // size))
    assert "".join(given) == TEXT and not any("\ufffd" in piece for piece in given)
    assert sum(map(bool, given)) > len(ids) / size / 3  # they come on the way, not at the end


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokens_that_are_no_text_end_as_the_tokenizer_has_them(kind, bpe):
    """Any tokens, special ones among them, in any pieces."""
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(tokenizer.vocab_size, size=40).tolist()
        given = pieces(TextStream(tokenizer), ids, rng.integers(1, 4, size=10).tolist())
        assert "".join(given) == tokenizer.decode(ids)


@pytest.mark.parametrize("size", [1, 4])
def test_text_that_ends_an_answer_is_left_out(size):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("one\n\ntwo \nthree\n\nfour")
    stream = TextStream(tokenizer, ["\nthree\n", "four"])
    given = pieces(stream, ids, [size] * (len(ids) // size))
    assert "".join(given) == stream.text == "one\n\ntwo " and stream.ended


def test_the_first_of_several_texts_ends_and_half_of_one_does_not():
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, ["end", "en"])
    assert stream.add(tokenizer.encode("the end")) == "the " and stream.ended
    stream = TextStream(tokenizer, ["end."])
    assert [stream.add(tokenizer.encode("the en")), stream.finish()] == ["the ", "en"] and not stream.ended
