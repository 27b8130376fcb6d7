import json
import logging
import os

import pyarrow
import pyarrow.parquet
import pytest

from moejax.config import ConfigError, DataConfig
from moejax.data import sources
from moejax.data.sources import find_sources, read_documents


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def read(*entries, **settings):
    """The whole documents of all entries."""
    found = find_sources(DataConfig(train=entries, **settings), "train")
    documents, text = [], ""
    for source in found:
        for part, ends in read_documents(source):
            text += part
            if ends:
                documents.append(text)
                text = ""
    assert text == ""
    return documents


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a.md", "a")
    write(tmp_path / "deep/er/c.py", "c")
    write(tmp_path / "deep/site-packages/d.py", "d")
    write(tmp_path / "deep/empty.py", "")
    write(tmp_path / "deep/binary", b"\x7fELF\0\0")
    write(tmp_path / ".git/config", "hidden folder")
    write(tmp_path / "deep/.hidden", "hidden file")
    return tmp_path


def test_folder_gives_its_text_files_in_the_order_of_their_paths(folder):
    assert read(str(folder)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("entries", "exclude", "want"),
    [
        (["b.txt", "a.md"], [], ["b", "a"]),
        (["*.md"], [], ["a"]),
        (["**/*.py"], [], ["c", "d"]),
        (["deep/**"], [], ["c", "d"]),
        (["**/*.py"], ["site-packages"], ["c"]),
        ([""], ["site-packages", "b.txt"], ["a", "c"]),
        (["deep/site-packages"], ["site-packages", "deep"], ["d"]),
        (["deep/site-packages/*"], ["site-packages", "deep"], ["d"]),
    ],
    ids=["files", "glob", "deep glob", "all below", "exclude in a glob", "exclude", "named folder", "named in a glob"],
)
def test_entries_and_exclude(folder, entries, exclude, want):
    assert read(*(str(folder / entry) for entry in entries), exclude=tuple(exclude)) == want


def test_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    assert read(write(tmp_path / "a[1].txt", "literal")) == ["literal"]


def test_text_file_is_one_document_with_its_bytes_kept(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo \xff\xfe three\r\n")
    assert read(path) == ["one\r\ntwo \ufffd\ufffd three\r\n"]


@pytest.mark.parametrize(
    "text",
    ["line of ünicode\n" * 50, "no line break " * 50, "\n" + "x" * 300, "x" * 32, "\n" * 77],
    ids=["lines", "one line", "break at the start", "exactly one part", "only breaks"],
)
def test_long_text_file_comes_in_parts_that_join_to_it(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sources, "PART_CHARACTERS", 32)
    path = write(tmp_path / "a.txt", text)
    parts = list(read_documents(*find_sources(DataConfig(train=(path,)), "train")))
    assert "".join(part for part, _ in parts) == text
    assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(part) for part, _ in parts) < 4 * 32
    if text.startswith("line"):
        assert len(parts) > 20 and all(part.endswith("\n") for part, _ in parts)


def test_jsonl_and_parquet_give_the_text_field_and_leave_out_empty_documents(tmp_path):
    texts = ["first", "", None, "zwölf\nlines", "last"]
    lines = "\n\n".join(json.dumps({"id": 1, "body": text}) for text in texts)
    jsonl = write(tmp_path / "a.jsonl", lines)
    parquet = write_parquet(tmp_path / "a.parquet", body=texts, id=[1, 2, 3, 4, 5])
    want = ["first", "zwölf\nlines", "last"]
    assert read(jsonl, text_field="body") == read(parquet, text_field="body") == want


def test_jsonl_text_is_always_valid_unicode(tmp_path):
    [text] = read(write(tmp_path / "a.jsonl", r'{"text": "half \ud83d a pair, whole \ud83d\ude00"}'))
    assert text == "half ? a pair, whole 😀"


BAD_LINES = {
    "not JSON": ('{"text": ', "Expecting value at column 9"),
    "not UTF-8": (b'{"text": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 10: invalid start byte"),
    "no object": ("[1]", 'no "text"'),
    "no field": ('{"body": "x"}', 'no "text"'),
    "too deep": ("[" * 100_000, "maximum recursion depth exceeded"),
    "no text": ('{"text": 3}', '"text" is not text'),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_jsonl_line_is_named_by_file_and_line(tmp_path, name):
    line, problem = BAD_LINES[name]
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    wanted = f'a JSON object with text under "text" in every line ({path} line 3: {problem}'
    assert str(caught.value).startswith(f"data.train[0]={path!r}: wanted {wanted}")
    assert str(caught.value).endswith("); data.bad_line=skip leaves such lines out")


def test_skipped_lines_are_counted_in_one_warning(tmp_path, caplog):
    lines = ["{}", '{"text": "a"}', "{", '{"text": "b"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    write(tmp_path / "b.jsonl", "\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert read(str(tmp_path), bad_line="skip") == ["a", "b", "a", "b"]
    assert caplog.messages == [f'data.train[0]: lines left out: 4, the first is {path} line 1: no "text"']


def test_entry_without_files_is_an_error_that_names_it(tmp_path):
    write(tmp_path / "full/a.txt", "text")
    write(tmp_path / "binary/a.bin", b"\0")
    (tmp_path / "empty").mkdir()
    at = {name: str(tmp_path / name) for name in ("missing.txt", "empty", "binary", "binary/a.bin", "*.txt", "full")}
    wanted = {
        "missing.txt": "a file, a folder or a glob that exists",
        "empty": "at least one text, JSONL or Parquet file there",
        "binary": "at least one text, JSONL or Parquet file there",
        "binary/a.bin": "text, JSONL or Parquet, and this file has NUL bytes",
        "*.txt": "at least one text, JSONL or Parquet file there, apart from data.exclude=('a.txt',)",
        "full": "at least one text, JSONL or Parquet file there, apart from data.exclude=('a.txt',)",
    }
    for name, text in wanted.items():
        exclude = ("a.txt",) if "exclude" in text else ()
        with pytest.raises(ConfigError) as caught:
            read(str(tmp_path / "binary" / ".." / "full" / "a.txt"), at[name], exclude=exclude)
        assert str(caught.value) == f"data.train[1]={at[name]!r}: wanted {text}"


def test_source_without_text_is_an_error(tmp_path):
    for path in (write(tmp_path / "a.txt", ""), write_parquet(tmp_path / "a.parquet", text=["", ""])):
        with pytest.raises(ConfigError) as caught:
            read(path)
        assert str(caught.value) == f"data.train[0]={path!r}: wanted at least one document that is not empty"


def test_unfit_parquet_files_are_errors(tmp_path):
    no_field = write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    numbers = write_parquet(tmp_path / "b.parquet", text=[1, 2])
    damaged = write(tmp_path / "c.parquet", "PAR1 not really")
    wanted = {
        no_field: f"Parquet files with the column of data.text_field='text' ({no_field} has body, id)",
        numbers: f"text in the column 'text' of data.text_field ({numbers} has int64)",
        damaged: f"whole Parquet files ({damaged}: Parquet magic bytes not found in footer.",
    }
    for path, text in wanted.items():
        with pytest.raises(ConfigError) as caught:
            read(path)
        assert str(caught.value).startswith(f"data.train[0]={path!r}: wanted {text}")
        assert "\n" not in str(caught.value)


def test_parquet_damaged_in_the_middle_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=[f"document {n} {os.urandom(20).hex()}" for n in range(5000)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[1000 : len(content) // 2] = b"\xff" * (len(content) // 2 - 1000)
    write(tmp_path / "a.parquet", bytes(content))
    with pytest.raises(ConfigError, match=r"data.train\[0\]=.*a.parquet") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_file_that_vanishes_while_it_is_read_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    [source] = find_sources(DataConfig(train=(path,)), "train")
    os.remove(path)
    with pytest.raises(ConfigError) as caught:
        list(read_documents(source))
    want = f"data.train[0]={path!r}: wanted files that can be read ({path}: No such file or directory)"
    assert str(caught.value) == want
