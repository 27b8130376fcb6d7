import dataclasses
import itertools
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.config import ConfigError, DataConfig
from moejax.data import Batch, Prefetcher, TrainBatches, merge_states, open_data
from moejax.data.batches import Packer, Rows, Shard, endless, fill_in_the_middle, to_batch
from moejax.data.cache import TokenFile
from moejax.data.documents import pieces, split, whole_files
from moejax.data.tokens import ByteTokenizer

BYTES = ByteTokenizer()
END = BYTES.end_id


def token_file(documents, hashes=None):
    """A TokenFile of lists of tokens, without a folder."""
    offsets = np.cumsum([0, *map(len, documents)])
    hashes = [hash(tuple(document)) % 2**64 for document in documents] if hashes is None else hashes
    return TokenFile(np.array([*itertools.chain(*documents)], np.uint16), offsets, np.array(hashes, np.uint64))


def random_documents(number, low=1, high=60, seed=0):
    rng = np.random.default_rng(seed)
    return [[*rng.integers(0, 256, rng.integers(low, high)).tolist(), END] for _ in range(number)]


def settings_of(**changes):
    defaults = {"sequence_length": 16, "batch_size": 16, "virtual_shards": 8, "fim_rate": 0.0, "train": ("x",)}
    return DataConfig(**defaults | changes)


def make(config, *sources, seed=3, **hosts):
    sources = sources or [random_documents(50)]
    return TrainBatches([whole_files([token_file(s)]) for s in sources], BYTES, config, seed=seed, **hosts)


def assert_equal(got, want):
    for field in dataclasses.fields(Batch):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), err_msg=field.name)


def joined(batches):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


MIX = (random_documents(50), random_documents(40, low=100, high=300, seed=1))
KINDS = {
    "plain": ({}, MIX[:1]),
    "fim": ({"fim_rate": 0.5}, MIX[:1]),
    "mix": ({"weights": (0.7, 0.3), "train": ("x", "y")}, MIX),
    "everything": ({"fim_rate": 0.5, "mask_documents": True, "weights": (0.7, 0.3), "train": ("x", "y")}, MIX),
    "one document": ({"fim_rate": 0.5, "mask_documents": True}, ([[*range(200), END]],)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    changes, sources = KINDS[request.param]
    return lambda **hosts: make(settings_of(**changes), *sources, **hosts)


# ----------------------------------------------------------------------------------------------------------- packing


lists = st.lists(st.lists(st.integers(0, 261), min_size=1, max_size=30), min_size=1, max_size=20)


@given(documents=lists, length=st.integers(1, 20), counts=st.lists(st.integers(0, 4), max_size=6), data=st.data())
def test_rows_of_a_packer_are_the_documents_joined(documents, length, counts, data):
    number = sum(counts) * length
    repeats = 1 + number // sum(map(len, documents))
    arrays = [np.array(document, np.int32) for document in documents] * repeats
    packer = Packer(arrays, length)
    rows = [packer.rows(count) for count in counts]
    tokens = np.concatenate([np.zeros((0, length), np.int32), *(part.tokens for part in rows)]).reshape(-1)
    starts = np.concatenate([np.zeros((0, length), bool), *(part.starts for part in rows)]).reshape(-1)
    np.testing.assert_array_equal(tokens, np.concatenate(arrays)[:number])
    first = np.concatenate([np.arange(len(array)) == 0 for array in arrays])[:number]
    np.testing.assert_array_equal(starts, first)

    where = data.draw(st.integers(0, len(counts)))  # and from any state on, too
    other = Packer(arrays, length)
    for count in counts[:where]:
        other.rows(count)
    again = Packer(arrays, length)
    again.seek(other.document, other.used)
    for count, want in zip(counts[where:], rows[where:], strict=True):
        np.testing.assert_array_equal(again.rows(count).tokens, want.tokens)


def test_a_batch_masks_documents_if_asked():
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    starts = np.array([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]], bool)
    masked = to_batch(Rows(tokens, starts), True)
    np.testing.assert_array_equal(masked.segment_ids, [[0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(masked.loss_mask[:, 1:], [[1, 0, 0, 1, 1], [1, 1, 1, 1, 0]])
    free = to_batch(Rows(tokens, starts), False)
    assert not free.segment_ids.any() and free.loss_mask.all()
    for batch in (masked, free):
        np.testing.assert_array_equal(batch.tokens, tokens)
        assert [leaf.dtype for leaf in jax.tree.leaves(batch)] == [np.int32, np.int32, bool]


def test_masked_segments_are_the_documents():
    batch = make(settings_of(mask_documents=True), random_documents(50)).next(16)
    after_end = np.cumsum(batch.tokens == END, axis=1)[:, :-1]
    np.testing.assert_array_equal(batch.segment_ids[:, 1:], after_end)
    np.testing.assert_array_equal(batch.loss_mask[:, 1:], batch.tokens[:, :-1] != END)


def documents_of(tokens):
    """The token lists that end in END; the first and the last may be cut off."""
    ends = np.flatnonzero(tokens == END)
    return [tuple(tokens[a + 1 : b + 1].tolist()) for a, b in itertools.pairwise(ends)]


def test_every_epoch_has_every_document_once_in_another_order():
    documents = random_documents(64, low=5)
    stream = endless(whole_files([token_file(documents)]), BYTES, 0.0, seed=1)
    epochs = [[tuple(stream[e * 64 + n].tolist()) for n in range(64)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(map(tuple, documents))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_shards_share_out_the_documents():
    documents = random_documents(64, low=15, high=16)  # 16 tokens each, so that one epoch is 64 rows of 16
    batches = make(settings_of(sequence_length=15), documents)
    rows = joined([batches.next(8) for _ in range(8)]).tokens
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, documents))


def test_seeds_give_different_batches():
    assert (make(settings_of(), seed=1).next(16).tokens != make(settings_of(), seed=2).next(16).tokens).any()
    assert_equal(make(settings_of(), seed=-5).next(16), make(settings_of(), seed=-5).next(16))


# --------------------------------------------------------------------------------------------------------------- fim


@given(body=st.lists(st.integers(0, 255), max_size=30), has_end=st.booleans(), seed=st.integers(0, 99))
def test_fill_in_the_middle_is_a_rearrangement(body, has_end, seed):
    tokens = np.array([*body, *[END] * has_end], np.int32)
    if len(tokens):
        got = fill_in_the_middle(tokens, BYTES, np.random.default_rng(seed)).tolist()
        hole, end = got.index(BYTES.fim.hole), got.index(BYTES.fim.end)
        assert got[0] == BYTES.fim.begin and got[-1] == END and len(got) == len(body) + 4
        prefix, suffix, middle = got[1:hole], got[hole + 1 : end], got[end + 1 : -1]
        assert prefix + middle + suffix == body


def test_fill_in_the_middle_has_its_rate_and_is_drawn_anew_each_epoch():
    documents = random_documents(1000, low=20, high=21)
    stream = endless(whole_files([token_file(documents)]), BYTES, 0.1, seed=1)
    epochs = [[stream[e * 1000 + n] for n in range(1000)] for e in range(2)]
    shares = [np.mean([tokens[0] == BYTES.fim.begin for tokens in epoch]) for epoch in epochs]
    np.testing.assert_allclose(shares, 0.1, atol=4 * (0.09 / 1000) ** 0.5)
    for epoch in epochs:
        plain = {tuple(tokens.tolist()) for tokens in epoch if tokens[0] != BYTES.fim.begin}
        assert plain < set(map(tuple, documents))
    changed = [{tuple(sorted(tokens.tolist())) for tokens in epoch if len(tokens) == 24} for epoch in epochs]
    assert changed[0] != changed[1]  # other documents


# --------------------------------------------------------------------------------------------------------------- mix


@pytest.mark.parametrize("weights", [(1, 1), (0.9, 0.1), (5, 3, 2), (0.01, 0.99)], ids=str)
def test_mix_has_its_shares_in_every_batch_and_shard(weights):
    length, shards = 4, 8
    sources = [[np.full(length, index, np.int32)] * 2000 for index in range(len(weights))]
    rows = [Shard(sources, weights, v / shards, length).rows(1000).tokens[:, 0] for v in range(shards)]
    which = np.stack(rows)
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        np.testing.assert_allclose((which == index).sum(axis=1), 1000 * share, atol=3)  # in each shard
        np.testing.assert_allclose((which == index).sum(axis=0), shards * share, atol=1)  # in each batch of V rows
        np.testing.assert_allclose((which == index).sum(), shards * 1000 * share, atol=8)


def test_mix_keeps_each_source_in_its_own_order():
    sources = [[np.full(4, 100 * index + n, np.int32) for n in range(90)] for index in range(2)]
    rows = Shard(sources, (0.6, 0.4), 0.0, 4).rows(100).tokens[:, 0]
    first = int((rows < 100).sum())
    assert abs(first - 60) <= 1
    assert rows[rows < 100].tolist() == list(range(first))
    assert rows[rows >= 100].tolist() == list(range(100, 200 - first))


# --------------------------------------------------------------------------------------- position, hosts, batch size


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_global_batches_are_the_same_on_any_number_of_hosts(kind, hosts):
    alone = kind()
    parts = [kind(host=host, num_hosts=hosts) for host in range(hosts)]
    for _ in range(20):
        batches = [part.next(16) for part in parts]
        assert all(batch.tokens.shape == (16 // hosts, 17) for batch in batches)
        assert_equal(joined(batches), alone.next(16))


@pytest.mark.parametrize("hosts", [1, 4])
def test_restore_is_exact_at_every_step_and_on_any_number_of_hosts(kind, hosts):
    alone, old = kind(), [kind(host=host, num_hosts=2) for host in range(2)]
    batches, states = [], []
    for _ in range(45):  # several epochs
        states.append(json.dumps(merge_states([host.state() for host in old])))
        batches.append(alone.next(16))
        assert_equal(joined([host.next(16) for host in old]), batches[-1])
    new = [kind(host=host, num_hosts=hosts) for host in range(hosts)]
    for step in (44, 0, 7, 20, 21, 41):
        for host in new:
            host.restore(json.loads(states[step]))
        for want in batches[step : step + 5]:
            assert_equal(joined([host.next(16) for host in new]), want)


def test_restore_where_a_row_ends_with_a_document():
    documents = random_documents(64, low=15, high=16)
    batches = make(settings_of(sequence_length=15), documents)
    batches.next(8)
    state = json.loads(json.dumps(batches.state()))
    other = make(settings_of(sequence_length=15), documents)
    other.restore(state)
    assert_equal(other.next(8), batches.next(8))


def test_state_is_small(kind):
    batches = kind()
    for _ in range(30):
        batches.next(16)
    assert len(json.dumps(batches.state())) < 100 * 8


def test_batch_size_may_change_and_each_shard_goes_on(kind):
    ramp, steady = kind(), kind()
    sizes = [8, 8, 16, 32, 8, 24]
    got = [np.split(ramp.next(rows).tokens, 8) for rows in sizes]
    want = [np.split(steady.next(8).tokens, 8) for _ in range(sum(sizes) // 8)]
    for shard in range(8):
        np.testing.assert_array_equal(
            np.concatenate([batch[shard] for batch in got]), np.concatenate([batch[shard] for batch in want])
        )


def test_position_in_other_data_is_refused():
    state = make(settings_of()).state()
    others = [
        make(settings_of(), random_documents(50, seed=9)),
        make(settings_of(), seed=4),
        make(settings_of(sequence_length=17)),
        make(settings_of(fim_rate=0.1)),
    ]
    for other in others:
        with pytest.raises(ConfigError, match=f"data=.*: wanted the text, tokenizer, seed .*{state['data']}"):
            other.restore(state)
    make(settings_of(batch_size=32, mask_documents=True)).restore(state)  # these do not move tokens


def test_rows_and_hosts_must_fit_the_shards():
    with pytest.raises(ValueError, match=r"rows=12 is not a multiple of data.virtual_shards=8"):
        make(settings_of()).next(12)
    with pytest.raises(ConfigError, match=r"data.virtual_shards=8: wanted a multiple of the 3 hosts"):
        make(settings_of(), num_hosts=3)


# ---------------------------------------------------------------------------------------------------------- prefetch


def test_prefetched_batches_and_positions_are_those_of_the_plain_ones(kind):
    plain, ahead = kind(), Prefetcher(kind())
    states = []
    for rows in [16, 16, 16, 8, 8, 24, 16]:
        assert ahead.state() == plain.state()
        states.append(ahead.state())
        assert_equal(ahead.next(rows), plain.next(rows))
    ahead.restore(states[2])
    plain.restore(states[2])
    assert ahead.state() == states[2]
    assert_equal(ahead.next(16), plain.next(16))
    assert ahead.state() == plain.state()
    ahead.close()


def test_prefetcher_works_ahead_and_says_how_long_it_waited():
    class Slow(TrainBatches):
        made = 0

        def next(self, rows):
            time.sleep(0.05)
            self.made += 1
            return super().next(rows)

    config = settings_of()
    slow = Slow([whole_files([token_file(random_documents(50))])], BYTES, config, seed=0)
    ahead = Prefetcher(slow, depth=2)
    ahead.next(16)
    assert ahead.waited >= 0.05
    deadline = time.monotonic() + 10
    while slow.made < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert slow.made == 3  # the one handed out and two more
    waited = ahead.waited
    ahead.next(16)
    assert ahead.waited - waited < 0.04
    ahead.close()


def test_error_in_the_thread_reaches_the_caller():
    ahead = Prefetcher(make(settings_of()))
    with pytest.raises(ValueError, match="rows=12"):
        ahead.next(12)
    assert_equal(ahead.next(16), make(settings_of()).next(16))
    ahead.close()


# ------------------------------------------------------------------------------------------------------------- split


def contents(documents):
    return [tuple(documents[index].tolist()) for index in range(len(documents))]


def test_split_by_hash_takes_the_fraction_and_never_parts_equal_documents():
    documents = random_documents(2000, low=20, high=60)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 2000, np.uint64)
    twice = token_file(documents + documents[::2], np.concatenate([hashes, hashes[::2]]))
    other = token_file(documents[::3], hashes[::3])
    [train], valid = split([twice, other], [], 0.1, by_source=False)
    assert not set(contents(train)) & set(contents(valid))
    assert sorted(contents(train) + contents(valid)) == sorted(map(tuple, documents + documents[::2] + documents[::3]))
    np.testing.assert_allclose(len(valid) / (len(train) + len(valid)), 0.1, atol=0.03)


def test_split_of_one_document_is_its_end():
    document = [*range(200), END]
    for value in (0, 2**64 - 1):  # whichever side its hash is on
        [train], valid = split([token_file([document], [value])], [], 0.1, by_source=False)
        assert contents(train) == [tuple(document[:181])] and contents(valid) == [tuple(document[181:])]


def test_split_cuts_a_document_that_would_be_all_of_validation():
    small = random_documents(100, low=10, high=11)
    large = [1] * 1000 + [END]
    hashes = [0, *np.linspace(1, 2**63, 100).astype(np.uint64)]
    [train], valid = split([token_file([large, *small], hashes)], [], 0.1, by_source=False)
    assert contents(valid)[0] == tuple([1] * 99 + [END])
    assert set(contents(valid)[1:]) == set(map(tuple, small[:20])) and len(contents(train)) == 81


def test_split_cuts_every_document_if_one_side_would_have_none():
    documents = [[index] * 99 + [END] for index in range(20)]
    for value in (0, 2**64 - 1):
        hashes = [value] * 20
        [train], valid = split([token_file(documents, hashes)], [], 0.1, by_source=False)
        assert contents(train) == [tuple(document[:90]) for document in documents]
        assert contents(valid) == [tuple(document[90:]) for document in documents]


def test_split_leaves_text_in_each_source_of_a_mix():
    many = random_documents(300, low=30, high=31)
    [one, other], valid = split([token_file(many), token_file([[7] * 400 + [END]], [0])], [], 0.05, by_source=True)
    assert contents(other) == [(7,) * 381]
    assert len(one) < 300 and contents(valid)[-1] == (7,) * 19 + (END,)


def test_training_leaves_out_what_is_in_the_validation_files():
    documents = random_documents(50)
    train, valid = token_file(documents), token_file(documents[10:20] + random_documents(5, seed=8))
    [kept], held = split([train], [valid], 0.01, by_source=False)
    assert contents(kept) == [tuple(document) for document in documents[:10] + documents[20:]]
    assert len(held) == 15


def test_fraction_zero_keeps_everything_for_training():
    documents = random_documents(50)
    [train], valid = split([token_file(documents)], [], 0.0, by_source=False)
    assert contents(train) == [tuple(document) for document in documents] and len(valid) == 0


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8), longest=st.integers(1, 500))
def test_pieces_join_to_the_documents(lengths, longest):
    documents = [[number % 250] * length for number, length in enumerate(lengths)]
    cut = whole_files([token_file(documents)]).cut(longest)
    assert [*itertools.chain(*contents(cut))] == [*itertools.chain(*documents)]
    assert cut.length.max() <= longest and cut.length.min() > 0
    per_document = [-(-length // longest) for length in lengths]
    assert len(cut) == sum(per_document)


def test_length_of_pieces_follows_the_corpus_and_the_row():
    def longest(tokens, sequence_length, shards):
        return pieces(whole_files([token_file([[1] * tokens])]), sequence_length, shards).length.max()

    assert longest(1_115_394, 64, 4) == 16_166  # 69 pieces of at most 16384
    assert longest(20_000, 16, 8) == 156  # 16 for each of 8 shards
    assert longest(20_000, 127, 8) == 500  # but at least 4 rows of 128
    assert longest(100_000, 8191, 8) == 25_000  # and never less than 4 rows


# --------------------------------------------------------------------------------------------------------- all of it


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    rng = np.random.default_rng(0)
    lines = [{"text": "".join(map(chr, rng.integers(97, 100 + n % 20, 30 + n % 50)))} for n in range(400)]
    (tmp_path / "text/a.jsonl").write_text("\n".join(map(json.dumps, lines + lines[:100])))
    (tmp_path / "text/b.txt").write_text("a b c d " * 100)
    return tmp_path


def open_corpus(corpus, **changes):
    hosts = {name: changes.pop(name) for name in ("host", "num_hosts") if name in changes}
    config = settings_of(**{"train": (str(corpus / "text"),), "valid_fraction": 0.1} | changes)
    return open_data(config, vocab_size=300, seed=0, cache=corpus / "cache", **hosts)


def test_no_validation_document_is_trained_on(corpus):
    data = open_corpus(corpus)
    trained = {text for source in data.train_documents for text in contents(source)}
    held = set(contents(data.valid_documents))
    assert len(held) > 10 and not trained & held
    assert data.num_valid_tokens == data.valid_documents.num_tokens
    steps = 3 * data.num_train_tokens // (32 * 17)
    rows = joined([data.train.next(32) for _ in range(steps)]).tokens
    shards = [np.concatenate(part) for part in zip(*(np.split(r, 8) for r in np.split(rows, steps)), strict=True)]
    seen = {document for shard in shards for document in documents_of(shard.reshape(-1))}
    assert not seen & held and len(seen & trained) > 0.9 * len(trained)


def test_validation_batches_are_the_same_every_time_and_have_one_shape(corpus):
    data = open_corpus(corpus, mask_documents=True, fim_rate=0.5)
    data.train.next(16)
    there = data.num_valid_tokens // 17
    rows = there // 2 - 1
    batches = data.valid_batches(10, rows)
    assert len(batches) == 3 and all(batch.tokens.shape == (rows, 17) for batch in batches)
    for batch, again in zip(batches, open_corpus(corpus, mask_documents=True).valid_batches(10, rows), strict=True):
        assert_equal(batch, again)
    every = joined(batches)
    text = np.concatenate([data.valid_documents[index] for index in range(len(data.valid_documents))])
    np.testing.assert_array_equal(every.tokens[:there].reshape(-1), text[: there * 17])
    assert every.loss_mask[:there, 1:].any(axis=1).all() and not every.loss_mask[there:].any()
    assert (every.tokens[:there] < 258).all()  # no fill in the middle


def test_few_validation_batches_are_spread_over_the_text(corpus):
    data = open_corpus(corpus)
    text = np.concatenate([data.valid_documents[index] for index in range(len(data.valid_documents))])
    there = len(text) // 17
    [batch] = data.valid_batches(1, 8)
    want = np.stack([text[row * 17 :][:17] for row in (np.arange(8) * there // 8)])
    np.testing.assert_array_equal(batch.tokens, want)
    assert batch.loss_mask.all()


def test_hosts_share_out_validation_rows(corpus):
    want = open_corpus(corpus).valid_batches(3, 16)
    parts = [open_corpus(corpus, host=host, num_hosts=4).valid_batches(3, 16) for host in range(4)]
    for got, batch in zip(zip(*parts, strict=True), want, strict=True):
        assert_equal(joined(got), batch)


def test_separate_validation_files(corpus):
    (corpus / "valid.jsonl").write_text((corpus / "text/a.jsonl").read_text().split("\n")[0] + "\n" + '{"text": "new"}')
    data = open_corpus(corpus, valid=(str(corpus / "valid.jsonl"),))
    assert len(data.valid_documents) == 2
    texts = [data.tokenizer.decode(text) for text in contents(data.valid_documents)]
    trained = [data.tokenizer.decode(text) for text in contents(data.train_documents[0])]
    assert texts[1] == "new" and texts[0] not in trained and len(trained) >= 498


def test_unigram_loss_is_the_cross_entropy_of_counted_tokens(corpus):
    data = open_corpus(corpus)
    train = np.concatenate([np.array(text) for text in contents(data.train_documents[0])])
    valid = np.concatenate([np.array(text) for text in contents(data.valid_documents)])
    probability = (np.array([(train == token).sum() for token in range(262)]) + 1) / (len(train) + 262)
    np.testing.assert_allclose(data.unigram_loss, -np.log(probability[valid]).mean(), rtol=1e-12)


def test_counts_of_a_large_corpus_are_of_every_nth_document():
    documents = whole_files([token_file([[n] * 10 for n in range(100)])])
    np.testing.assert_array_equal(documents.count_tokens(100), np.full(100, 10))
    np.testing.assert_array_equal(documents.count_tokens(100, at_most=400), [10, 0, 0] * 33 + [10])


def test_data_without_validation(corpus):
    data = open_corpus(corpus, valid_fraction=0.0)
    assert data.valid_batches(4, 8) == [] and data.unigram_loss is None and data.num_valid_tokens == 0


def test_one_small_file_feeds_all_shards(tmp_path):
    (tmp_path / "text").write_text("".join(f"{n:03} " for n in range(1000)))
    data = open_corpus(tmp_path)
    assert data.num_train_tokens + data.num_valid_tokens == 4001
    rows = data.train.next(64).tokens
    assert len({tuple(row) for row in rows.tolist()}) == 64
    seen = joined([data.train.next(64) for _ in range(20)]).tokens
    assert set(np.unique(seen)) == {*map(ord, "0123456789 ")}
    [batch] = data.valid_batches(1, 8)
    assert data.tokenizer.decode(batch.tokens[0].tolist()).startswith("00 901 902")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ()}, "data.train=(): wanted at least one file, folder or glob"),
        (
            {"sequence_length": 10_000},
            "data.train=('FOLDER/text',): wanted at least 80008 training tokens, 8 (data.virtual_shards) rows of 10001 "
            "(data.sequence_length and one more), not ",
        ),
        (
            {"train": ("FOLDER/text", "FOLDER/short.txt"), "weights": (1.0, 1.0)},
            "data.train[1]='FOLDER/short.txt': wanted at least 136 training tokens, 8 (data.virtual_shards) rows of 17 "
            "(data.sequence_length and one more), not 90",
        ),
        (
            {"valid_fraction": 1e-5},
            "data.valid_fraction=1e-05: wanted at least 17 validation tokens (data.sequence_length and one more), "
            "not 0",
        ),
        (
            {"valid": ("FOLDER/tiny.txt",)},
            "data.valid=('FOLDER/tiny.txt',): wanted at least 17 validation tokens (data.sequence_length and one more)"
            ", not 5",
        ),
        ({"valid": ("FOLDER/none",)}, "data.valid[0]='FOLDER/none': wanted a file, a folder or a glob that exists"),
    ],
    ids=["no text", "rows too long", "a short source", "no validation", "too little validation", "missing"],
)
def test_data_that_cannot_make_batches_is_one_line(corpus, changes, message):
    (corpus / "short.txt").write_text("x" * 99)
    (corpus / "tiny.txt").write_text("tiny")
    fill = lambda value: tuple(v.replace("FOLDER", str(corpus)) if isinstance(v, str) else v for v in value)  # noqa: E731
    changes = {name: fill(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    with pytest.raises(ConfigError) as caught:
        open_corpus(corpus, **changes)
    assert str(caught.value).startswith(message.replace("FOLDER", str(corpus)))


def test_data_starts_no_devices(corpus):
    program = (
        "from moejax.config import DataConfig\n"
        "from moejax.data import open_data\n"
        f"config = DataConfig(train=({str(corpus / 'text')!r},), sequence_length=16, batch_size=16)\n"
        f"data = open_data(config, vocab_size=300, seed=0, cache={str(corpus / 'cache')!r})\n"
        "print(data.train.next(16).tokens.shape)\n"
    )
    environment = {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": ":".join(sys.path)}  # a device would be an error
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("(16, 17)\n", 0), done.stderr
