"""Files of rows as people have them: other editors' bytes, folders, patterns, compression, and damage."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.data import files
from megarl.data.files import expand, records
from megarl.errors import UserError

ROWS = [{"prompt": "a\u2028b\u0085c", "answer": "1\u2029"}, {"prompt": "d", "answer": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in ROWS).encode()


def read(file: Path) -> list[tuple[int, object]]:
    return list(records(file, {"prompt", "answer"})[1])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", LINES, [1, 3]),
        ("a.json", LINES, [1, 3]),
        ("a.json", b"[\n" + json.dumps(ROWS, ensure_ascii=False).encode()[1:], [0, 1]),
        ("a.json", b" [" + b" " * 2000 + json.dumps(ROWS).encode()[1:], [0, 1]),
        ("a.jsonl.gz", LINES, [1, 3]),
        ("a.json.gz", json.dumps(ROWS).encode(), [0, 1]),
    ],
)
def test_rows_survive_other_editors(tmp_path: Path, mark: bytes, name: str, content: bytes, numbers: list[int]) -> None:
    """Byte-order marks, CRLF, empty lines, Unicode's line ends inside text, compression: the same rows, and the
    numbers that an editor shows."""
    file = tmp_path / name
    (gzip.open if name.endswith("gz") else open)(file, "wb").write(mark + content)
    assert read(file) == list(zip(numbers, ROWS, strict=True))


def test_folders_and_patterns_are_their_files(tmp_path: Path) -> None:
    """In the order of their names; hidden files and descriptions in *.json stay out of a folder."""
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", ".hidden.jsonl", "info.json", "readme.md"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").touch()

    def names(path: Path) -> list[str]:
        return [file.name for file in expand([path], "data.train")]

    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert names(tmp_path / "[ab].*") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "d.jsonl"]
    (tmp_path / "x[1].jsonl").touch()
    assert names(tmp_path / "x[1].jsonl") == ["x[1].jsonl"]
    (tmp_path / "empty").mkdir()
    for path, words in [
        (tmp_path / "empty", "data.train: .*empty has no file .*jsonl"),
        (tmp_path / "*.parquet", "data.train: .*parquet is a pattern that no file matches"),
        (tmp_path / "*.md", "data.train: .*readme.md: unknown kind of file"),
        (tmp_path / "z.jsonl", "data.train: .*z.jsonl does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            expand([path], "data.train")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "a.jsonl:1: malformed JSONL line: byte 13 is not UTF-8"),
        ("a.jsonl", '{"prompt": "q"}\n'.encode("utf-16"), "a.jsonl: is UTF-16 or UTF-32; save it as UTF-8"),
        ("a.json", '[{"prompt": "q"}]'.encode("utf-32"), "a.json: is UTF-16 or UTF-32; save it as UTF-8"),
        ("a.jsonl", '{"prompt": "q"}\n'.encode("utf-16-le"), "a.jsonl:1: malformed JSONL line: .* character 2"),
        ("a.json", b"[" * 100_000, "a.json: malformed JSON: nested too deeply"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: not a readable gzip file: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-12], "a.jsonl.gz: not a readable gzip file: Compressed file ended"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable Parquet file"),
    ],
)
def test_damage_is_one_line_that_names_the_place(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed file of few bytes may have a line of terabytes."""
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(LINES + b"x" * 5000))
    with pytest.raises(UserError, match="a.jsonl.gz:5: has more than 1000 bytes"):
        read(file)


def test_nested_parquet_in_one_large_row_group(tmp_path: Path) -> None:
    """Chat messages of 10 MB in a single row group come back row by row; so do large lists and dictionary columns."""
    chats = [[{"role": "user", "content": f"{i} " + "x" * 100_000}] for i in range(100)]
    kind = pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())]))
    answers = pa.array([str(i) for i in range(100)]).dictionary_encode()
    pq.write_table(
        pa.table({"prompt": pa.array(chats, kind), "answer": answers, "other": [1] * 100}),
        tmp_path / "a.parquet",
        row_group_size=100,
    )
    rows = read(tmp_path / "a.parquet")
    assert [(number, row["prompt"], row["answer"]) for number, row in rows] == [  # type: ignore[index]
        (i, chat, str(i)) for i, chat in enumerate(chats)
    ]


def test_damaged_bytes_anywhere_are_one_line(tmp_path: Path) -> None:
    """Bytes exchanged, cut and inserted in every kind of file: rows, or UserError, never another exception."""
    pq.write_table(pa.Table.from_pylist(ROWS * 20), tmp_path / "whole.parquet")
    wholes = {
        ".jsonl": LINES, ".json": json.dumps(ROWS).encode(), ".jsonl.gz": gzip.compress(LINES * 9),
        ".parquet": (tmp_path / "whole.parquet").read_bytes(),
    }  # fmt: skip
    rng = random.Random(1)
    for kind, whole in wholes.items():
        refused = 0
        for _ in range(150):
            text = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(text))
                text[at : at + rng.randint(0, 4)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 4)))
            file = tmp_path / f"damaged{kind}"
            file.write_bytes(text)
            try:
                read(file)
            except UserError as e:
                refused += 1
                assert "\n" not in str(e)
        assert refused > 20, kind
