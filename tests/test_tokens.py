import json
import resource
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError, DataConfig
from moejax.data import cache, open_tokenizer, train_tokenizer
from moejax.data.cache import open_tokens
from moejax.data.sources import find_sources
from moejax.data.tokens import END, FIM_BEGIN, FIM_END, FIM_HOLE, SPECIAL_TOKENS, ByteTokenizer, bytes_as_file

TEXT = (
    "In 1234567 years the quick brown fox, 敏捷的棕色狐狸, jumps over don't and 3.14159!\n\n\tdef f(x): return x\r\n"
    * 40
)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)  # surrogates are not text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The path of a BPE of 320 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    out = folder / "made" / "tokenizer.json"
    assert train_tokenizer([str(folder / "*.txt")], 320, out, DataConfig()) == 320
    return str(out)


def tokenizer_without(trained, *names):
    """JSON text of the trained tokenizer without some of its special tokens."""
    content = json.loads(Path(trained).read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    content["model"]["vocab"] = {t: index for t, index in content["model"]["vocab"].items() if t not in names}
    return json.dumps(content)


# -------------------------------------------------------------------------------------------------------- tokenizers


@given(text=any_text)
def test_byte_tokens_are_utf8(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_has_the_special_tokens_after_the_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.begin_id, tokenizer.end_id) == (262, 256, 257)
    assert (tokenizer.fim.hole, tokenizer.fim.begin, tokenizer.fim.end) == (259, 260, 261)
    assert tokenizer.decode([256, 104, 105, 257, 300, 0xE6]) == "hi\ufffd"
    np.testing.assert_array_equal(tokenizer.token_bytes, [1] * 256 + [0] * 6)


@settings(max_examples=50)
@given(text=any_text | st.just("".join(map(chr, range(0x800)))))
def test_bytes_as_a_file_give_the_same_ids(byte_file, text):
    own = ByteTokenizer()
    assert byte_file.encode(text) == own.encode(text)
    assert byte_file.decode(byte_file.encode(text)) == text
    assert (byte_file.begin_id, byte_file.end_id, byte_file.fim) == (own.begin_id, own.end_id, own.fim)
    np.testing.assert_array_equal(byte_file.token_bytes, own.token_bytes)


@pytest.fixture(scope="module")
def byte_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    file.write_text(bytes_as_file(), encoding="utf-8")
    return open_tokenizer(str(file), vocab_size=262)


def test_trained_tokenizer_has_the_published_special_tokens_first(trained):
    tokenizer = open_tokenizer(trained, vocab_size=320, fim_rate=0.1)
    assert tokenizer.vocab_size == 320
    assert (tokenizer.begin_id, tokenizer.end_id) == (0, 1)
    assert (tokenizer.fim.hole, tokenizer.fim.begin, tokenizer.fim.end) == (3, 4, 5)
    words = ["begin▁of▁sentence", "end▁of▁sentence", "▁pad▁", "fim▁hole", "fim▁begin", "fim▁end"]
    names = [f"<\uff5c{word}\uff5c>" for word in words]
    content = tokenizers.Tokenizer.from_file(trained)
    assert [content.id_to_token(index) for index in range(6)] == names


@settings(max_examples=50)
@given(text=any_text | st.just(TEXT))
def test_trained_tokenizer_gives_text_back_and_counts_its_bytes(trained, text):
    tokenizer = open_tokenizer(trained, vocab_size=320)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode([1, *ids, 0, 399_999, -1]) == text


def test_trained_tokenizer_splits_as_published(trained):
    tokenizer = open_tokenizer(trained, vocab_size=320)
    ids = tokenizer.encode("12345678 don't 敏捷fox!\n\n")
    pieces = tokenizers.Tokenizer.from_file(trained).pre_tokenizer.pre_tokenize_str("12345678 don't 敏捷fox!\n\n")
    spans = [(first, past) for _, (first, past) in pieces]
    text = "12345678 don't 敏捷fox!\n\n"
    assert [text[a:b] for a, b in spans] == ["123", "456", "78", " don", "'t", " ", "敏捷", "fox", "!\n\n"]
    assert len(ids) < len(text.encode())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_stays_text(trained, name):
    tokenizer = open_tokenizer(trained, vocab_size=320)
    ids = tokenizer.encode(f"a{name}b")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == f"a{name}b"


def test_truncation_and_padding_of_the_file_are_off(trained, tmp_path):
    content = tokenizers.Tokenizer.from_file(trained)
    content.enable_truncation(3)
    content.enable_padding(length=50)
    content.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"), vocab_size=320)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("12")) <= 2


def test_bytes_of_a_sentencepiece_vocabulary(tmp_path):
    letters = [END, "▁", "a", "b", "é", "▁ab", *(f"<0x{n:02X}>" for n in range(256))]
    model = tokenizers.models.BPE(
        {token: index for index, token in enumerate(letters)},
        [],
        byte_fallback=True,
        unk_token=None,
    )
    content = tokenizers.Tokenizer(model)
    content.add_special_tokens(letters[:1])
    content.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    content.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"), vocab_size=300)
    text = "ab é ab 狐"
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.token_bytes[:6].tolist() == [0, 1, 1, 1, 2, 3]


def test_ids_may_have_holes(trained, tmp_path):
    content = json.loads(Path(trained).read_text(encoding="utf-8"))
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 449
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert open_tokenizer(str(tmp_path / "tokenizer.json"), vocab_size=450).vocab_size == 450
    with pytest.raises(ConfigError, match=r"at most model.vocab_size=449 tokens, this one has 450"):
        open_tokenizer(str(tmp_path / "tokenizer.json"), vocab_size=449)


def test_unfit_tokenizers_are_errors(trained, tmp_path):
    paths = {name: str(tmp_path / name) for name in ("none.json", "text.json", "no_end.json", "no_fim.json")}
    (tmp_path / "text.json").write_text("{}")
    (tmp_path / "no_end.json").write_text(tokenizer_without(trained, END))
    (tmp_path / "no_fim.json").write_text(tokenizer_without(trained, FIM_HOLE))
    needs_fim = f"{FIM_BEGIN}, {FIM_HOLE} and {FIM_END}, because data.fim_rate=0.1 is above 0"
    cases = [
        ("bytes", 256, "a tokenizer of at most model.vocab_size=256 tokens, this one has 262"),
        (trained, 319, "a tokenizer of at most model.vocab_size=319 tokens, this one has 320"),
        (paths["none.json"], 320, '"bytes", or a tokenizer.json that exists'),
        (paths["text.json"], 320, "a tokenizer.json ("),
        (str(tmp_path), 320, f"a tokenizer.json that can be read ([Errno 21] Is a directory: '{tmp_path}')"),
        (paths["no_end.json"], 320, f"a tokenizer with the token {END}, which ends a document"),
        (paths["no_fim.json"], 320, f"a tokenizer with {needs_fim}"),
    ]
    for name, vocab_size, wanted in cases:
        with pytest.raises(ConfigError) as caught:
            open_tokenizer(name, vocab_size=vocab_size, fim_rate=0.1)
        assert str(caught.value).startswith(f"data.tokenizer={name!r}: wanted {wanted}")
    assert open_tokenizer(paths["no_fim.json"], vocab_size=320, fim_rate=0).fim is None


def test_training_a_tokenizer_reports_bad_input(tmp_path):
    bad = tmp_path / "a.jsonl"
    bad.write_text('{"text": "good"}\n{\n')
    with pytest.raises(ConfigError, match=r"data.train\[0\]=.*a.jsonl line 2"):
        train_tokenizer([str(bad)], 300, tmp_path / "t.json", DataConfig())
    with pytest.raises(ConfigError, match="vocab_size=261: wanted at least 262: 256 bytes and 6 special"):
        train_tokenizer([str(bad)], 261, tmp_path / "t.json", DataConfig())
    assert train_tokenizer([str(bad)], 300, tmp_path / "t.json", DataConfig(bad_line="skip")) < 300
    with pytest.raises(ConfigError, match=r"out='.*a.jsonl/t.json': wanted a file that can be written \(.*exists"):
        train_tokenizer([str(bad)], 300, bad / "t.json", DataConfig(bad_line="skip"))


# ------------------------------------------------------------------------------------------------------------- cache


class CountingTokenizer(ByteTokenizer):
    """Bytes; counts the texts that it encodes."""

    texts = 0

    def encode_batch(self, texts):
        self.texts += len(texts)
        return super().encode_batch(texts)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(5)))
    (tmp_path / "text/b.txt").write_text("die 狐\n" * 10)
    return lambda: find_sources(DataConfig(train=(str(tmp_path / "text"),)), "train")[0]


def documents(tokens):
    return [tokens.tokens[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def test_cache_has_each_document_with_its_end_and_hash(source, tmp_path, monkeypatch):
    monkeypatch.setattr("moejax.data.sources.PART_CHARACTERS", 20)
    monkeypatch.setattr(cache, "BATCH_CHARACTERS", 15)
    tokens = open_tokens(source(), ByteTokenizer(), tmp_path / "cache")
    want = [f"line {n}" for n in range(5)] + ["die 狐\n" * 10]
    assert documents(tokens) == [[*text.encode(), 257] for text in want]
    assert tokens.tokens.dtype == np.uint16
    assert len(set(tokens.hashes.tolist())) == 6
    monkeypatch.setattr("moejax.data.sources.PART_CHARACTERS", 1000)
    whole = open_tokens(source(), ByteTokenizer(), tmp_path / "other")
    np.testing.assert_array_equal(whole.hashes, tokens.hashes)


def test_large_vocabularies_have_wide_tokens(source, tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size, tokenizer.end_id = 70_000, 69_999
    tokens = open_tokens(source(), tokenizer, tmp_path)
    assert tokens.tokens.dtype == np.uint32 and tokens.tokens[-1] == 69_999


def test_cached_text_is_not_tokenised_again_until_it_changes(source, tmp_path):
    tokenizer = CountingTokenizer()
    first = open_tokens(source(), tokenizer, tmp_path / "cache")
    assert tokenizer.texts == 6
    again = open_tokens(source(), tokenizer, tmp_path / "cache")
    assert tokenizer.texts == 6 and documents(again) == documents(first)
    (tmp_path / "text/b.txt").write_text("new")
    assert documents(open_tokens(source(), tokenizer, tmp_path / "cache"))[-1] == [*b"new", 257]
    (tmp_path / "text/c.txt").write_text("more")
    assert documents(open_tokens(source(), tokenizer, tmp_path / "cache"))[-1] == [*b"more", 257]
    assert tokenizer.texts == 6 + 6 + 7


def test_interrupted_tokenisation_leaves_nothing(source, tmp_path, monkeypatch):
    class Interrupted(ByteTokenizer):
        def encode_batch(self, texts):
            if len(texts) == 1:
                raise KeyboardInterrupt
            return super().encode_batch(texts)

    monkeypatch.setattr(cache, "BATCH_CHARACTERS", 30)
    with pytest.raises(KeyboardInterrupt):
        open_tokens(source(), Interrupted(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(documents(open_tokens(source(), ByteTokenizer(), tmp_path / "cache"))) == 6


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "meta.json"])
def test_damaged_cache_is_made_again(source, tmp_path, name):
    want = documents(open_tokens(source(), ByteTokenizer(), tmp_path / "cache"))
    [folder] = (tmp_path / "cache").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert documents(open_tokens(source(), ByteTokenizer(), tmp_path / "cache")) == want
    assert (folder / name).read_bytes() == content


def test_two_processes_may_write_the_same_cache(source, tmp_path):
    class Beaten(ByteTokenizer):
        def encode_batch(self, texts):
            open_tokens(source(), ByteTokenizer(), tmp_path / "cache")  # the other process, meanwhile
            return super().encode_batch(texts)

    assert len(documents(open_tokens(source(), Beaten(), tmp_path / "cache"))) == 6
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_full_disk_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 400_000)
    [source] = find_sources(DataConfig(train=(str(tmp_path / "a.txt"),)), "train")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # stands in for a disk with that much room
    try:
        with pytest.raises(ConfigError) as caught:
            open_tokens(source, ByteTokenizer(), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wanted = "a folder with room for the tokens of data.train[0] (File too large)"
    assert str(caught.value) == f"data.cache={str(tmp_path / 'cache')!r}: wanted {wanted}"
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_is_a_file_is_an_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache='.*/file': wanted a folder .*\(Not a directory\)"):
        open_tokens(source(), ByteTokenizer(), tmp_path / "file")
