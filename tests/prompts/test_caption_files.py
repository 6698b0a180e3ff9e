"""Captions of tables, folders and globs; csv, json and pyarrow write what is read here."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wandistiller.errors import UserError
from wandistiller.files.json_files import MAX_BYTES
from wandistiller.prompts.prompts import load_prompts

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = [
    "a cat, asleep",
    'a "quoted" dog',
    "猫在窗台上",
    "Día de los Muertos — “quotes”",
    "# a caption that begins so",
]


def csv_text(rows: list[dict], dialect: str = "excel") -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), dialect=dialect)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def table(captions: list, column: str = "caption") -> list[dict]:
    return [{"id": index, column: caption, "score": 0.5} for index, caption in enumerate(captions)]


def parquet_bytes(columns: dict, **types) -> bytes:
    stream = io.BytesIO()
    arrays = {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), stream, row_group_size=2)
    return stream.getvalue()


def columns_of(rows: list[dict]) -> dict:
    return {name: [row[name] for row in rows] for name in rows[0]}


WRITERS = {
    "p.csv": lambda rows: csv_text(rows).encode(),
    "P.CSV": lambda rows: csv_text(rows).encode("utf-8-sig"),
    "p.tsv": lambda rows: csv_text(rows, "excel-tab").encode(),
    "p.jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows).encode(),
    "p.ndjson": lambda rows: "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
    "p.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "p.parquet": lambda rows: parquet_bytes(columns_of(rows)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", ["caption", "Prompt", "TEXT"])
def test_what_other_libraries_write_is_read(tmp_path, name, column):
    (tmp_path / name).write_bytes(WRITERS[name](table([*CAPTIONS, CAPTIONS[0]], column)))
    found = load_prompts(tmp_path / name)
    assert (found.prompts, found.notice) == (CAPTIONS, "1 repeated lines left out")


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_every_kind_of_text_in_parquet_is_a_caption(tmp_path, kind):
    (tmp_path / "p.parquet").write_bytes(parquet_bytes({"id": [1, 2], "text": ["a cat", "a dog"]}, text=kind))
    assert load_prompts(tmp_path / "p.parquet").prompts == ["a cat", "a dog"]


@pytest.mark.parametrize(("short", "long"), [("short", "long"), ("text", "caption")])
def test_a_column_is_named_where_none_or_more_than_one_has_the_name_of_captions(tmp_path, short, long):
    for name in WRITERS:
        (tmp_path / name).write_bytes(WRITERS[name]([{short: "a cat", long: "a cat that sleeps"}]))
        with pytest.raises(UserError, match=f"give --caption_column .* it has {short!r}, {long!r}"):
            load_prompts(tmp_path / name)
        assert load_prompts(tmp_path / name, long.upper()).prompts == ["a cat that sleeps"]
        with pytest.raises(UserError, match=f"no column of it is called words; .* it has {short!r}, {long!r}"):
            load_prompts(tmp_path / name, "words")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_rows_without_a_usable_caption_are_counted_and_the_column_is_the_same_whatever_the_first_holds(tmp_path, name):
    values = [None, "a cat", "", "  ", 7, [8], ["a dog", None], "a\nb  c", "bell\x07", "x " * 500_000, "a cat", "NaN"]
    rows = [
        {"file_name": "1.png"},
        ["0001", "a list"],
        *({"file_name": "2.png", "Caption": value} for value in values),
        "a text by itself",
    ]
    (tmp_path / name).write_bytes(WRITERS[name](rows))
    found = load_prompts(tmp_path / name)
    assert found.prompts == ["a cat", "a dog", "a b c", "x " * 9_999 + "x", "a text by itself"]
    assert found.notice == (
        "1 repeated lines left out; 10 rows left out: 5 whose caption is empty, 2 whose caption is no text, "
        "1 that are lists (a row is an object or a text), "
        "1 whose caption holds the control character U+0007, 1 whose caption is NaN; 1 cut to 20,000 letters"
    )


def test_rows_of_a_csv_with_other_cells_than_its_first_line_are_counted_and_left_out(tmp_path):
    (tmp_path / "p.csv").write_text("caption,id\na cat, asleep,1\na dog,2\nalone\n\n", encoding="utf-8")
    found = load_prompts(tmp_path / "p.csv")
    assert found.prompts == ["a dog"] and found.notice.startswith("2 rows left out: 2 with more or fewer cells")


def test_lists_of_captions_in_parquet_are_all_read(tmp_path):
    lists = {"key": ["1", "2", "3"], "captions": [None, ["a red fox", None, "a fox"], []]}
    (tmp_path / "p.parquet").write_bytes(parquet_bytes(lists))
    found = load_prompts(tmp_path / "p.parquet")
    assert found.prompts == ["a red fox", "a fox"] and "3 whose caption is empty" in found.notice


CSV_DIALECTS = {
    "semicolons": 'id;caption;score\r\n1;a red fox, in snow;0.5\r\n2;"a house; on a hill";0.75\r\n',
    "tabs": "id\tcaption\n1\ta red fox, in snow\n2\ta house; on a hill\n",
    "bars": "id|caption\n1|a red fox, in snow\n2|a house; on a hill\n",
    "one column without quotes": "caption\na red fox, in snow\na house; on a hill\n",
    "line breaks in quotes": 'id,caption\n1,"a red\nfox, in snow"\n2,a house; on a hill\n',
}  # fmt: skip


@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
@pytest.mark.parametrize("text", CSV_DIALECTS.values(), ids=CSV_DIALECTS)
def test_a_table_of_cells_is_read_by_the_delimiter_that_it_has(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_prompts(tmp_path / name).prompts == ["a red fox, in snow", "a house; on a hill"]


def test_caption_files_beside_pictures_are_one_caption_each(tmp_path):
    texts = {
        "1.txt": "**Subject:** a fox\n\n# Style\nphotorealistic",
        "2.txt": "a boat",
        "3.caption": "a ship\nat sea",
        "list.txt": "a\nb",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    apart = ["**Subject:** a fox", "photorealistic", "a boat", "a ship at sea", "a", "b"]
    assert load_prompts(tmp_path).prompts == apart
    assert "3 files read a prompt a line (--prompt_per file" in load_prompts(tmp_path).notice
    for name in ("1.png", "2.mp4"):
        (tmp_path / name).touch()
    whole = ["**Subject:** a fox # Style photorealistic", "a boat", "a ship at sea"]
    assert (
        load_prompts(tmp_path).prompts == [*whole, "a", "b"] and load_prompts(tmp_path / "1.txt").prompts == whole[:1]
    )
    assert "3 caption files taken whole, a prompt each (--prompt_per line" in load_prompts(tmp_path).notice
    assert load_prompts(tmp_path, prompt_per="file").prompts == [*whole, "a b"]
    assert load_prompts(tmp_path / "1.txt", prompt_per="line").prompts == apart[:2]
    assert load_prompts(f"{tmp_path}/*", prompt_per="line").prompts[-4:] == ["a ship", "at sea", "a", "b"]


@pytest.mark.parametrize("stem", ["img", "img.png", "img.v2", "img.v2.png"])
def test_a_caption_belongs_to_a_picture_however_both_are_named(tmp_path, stem):
    (tmp_path / f"{stem.removesuffix('.png')}.png").touch()
    (tmp_path / f"{stem}.txt").write_text("a fox\n\nin snow", encoding="utf-8")
    assert load_prompts(tmp_path).prompts == ["a fox in snow"]


@pytest.mark.parametrize("name", ["bomb.json", "bomb.parquet", "dictionary.parquet", "lists.parquet"])
def test_what_unpacks_to_far_more_than_captions_do_costs_bounded_memory(tmp_path, name):
    path = tmp_path / name
    if name == "bomb.json":
        path.write_bytes(b"[%s{}]" % (b"{},\n" * (MAX_BYTES // 4)))
    else:
        text = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * 32 * 4096, pyarrow.int32()), pyarrow.array(["x" * 100_000])
        )
        column = pyarrow.ListArray.from_arrays([0, 32 * 4096], text) if name == "lists.parquet" else text
        values = pyarrow.array(["x" * 99_000] * 1000) if name == "bomb.parquet" else column
        table = pyarrow.table({"caption": values})
        pyarrow.parquet.write_table(
            table, path, use_dictionary=name != "bomb.parquet", compression="zstd", store_schema=False
        )
    code = (
        "import re, sys; from wandistiller.prompts.prompts import load_prompts\n"
        "try: found = load_prompts(sys.argv[1]); print(len(found.prompts), found.notice)\n"
        "except ValueError as error: print(error)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=True)
    said, peak_kib = done.stdout.splitlines()
    expected = {"bomb.json": "is larger than", "bomb.parquet": "unpacks to more than 100 times"}
    assert expected.get(name, f"1 {32 * 4096 - 1} repeated lines left out") in said
    assert int(peak_kib) < 350_000, said


def test_a_row_of_parquet_that_is_not_utf8_is_left_out(tmp_path):
    raw = pyarrow.array([b"a cat", b"caf\xe9", b"a dog"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "p.parquet")
    found = load_prompts(tmp_path / "p.parquet")
    assert found.prompts == ["a cat", "a dog"] and found.notice == "1 rows left out: 1 whose caption is not UTF-8 text"


CELLS = st.none() | st.text(max_size=6) | st.integers() | st.lists(st.none() | st.text(max_size=3), max_size=3)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(CELLS, min_size=1, max_size=8), st.sampled_from(["p.jsonl", "p.json", "p.csv", "p.tsv"]))
def test_every_row_is_used_or_counted(tmp_path_factory, cells, name):
    if name in ("p.csv", "p.tsv"):
        cells = [cell.translate({13: 32, 0: 32}) if isinstance(cell, str) else str(cell) for cell in cells]
    rows = [{"file_name": f"{index}.png", "text": cell} for index, cell in enumerate(cells)]
    path = tmp_path_factory.mktemp("rows") / name
    path.write_bytes(WRITERS[name](rows))
    given_texts = [text for cell in cells for text in (cell if isinstance(cell, list) and cell else [cell])]
    try:
        found = load_prompts(path)
    except UserError as error:
        what_it_looks_like = "holds no captions, and lines such as"
        assert f"holds no prompt; {len(given_texts)} rows left out" in str(error) or what_it_looks_like in str(error)
    else:
        not_used = re.findall(r"(\d+) (?:rows|repeated lines) left out", found.notice)
        assert len(found.prompts) + sum(map(int, not_used)) == len(given_texts)
        assert {" ".join(prompt.split()) for prompt in found.prompts} <= {
            " ".join(str(text).split()) for text in given_texts
        }


WRONG = {
    "no header.csv": (b"a cat that sleeps on a chair\na dog\n", "no column of it is called caption or captions or prompt"),
    "latin.csv": ("caption\na\ncafé\n".encode("latin-1"), "line 3: byte 0xE9 is not UTF-8"),
    "cut.jsonl": (b'{"caption": "a cat"}\n{"capt', "line 2: "),
    "settings.json": (b'{"general": {"caption": "a"}}', "no column of it is called"),
    "cut.json": (b'[{"caption": "a"}', "not valid JSON"),
    "deep.json": (b"[" * 100_000, "nested more than"),
    "p.csv.gz": (b"", "is packed by its name; unpack it"),
    "caption.parquet": (parquet_bytes({"id": [1, 2], "caption": [3, 4]}), "is no whole Parquet file with text in its column"),
    "cut.parquet": (parquet_bytes({"caption": ["a", "b"]})[:-9], "is no whole Parquet file"),
    "open.csv": (b'id,caption\n1,a fox\n2,"a blue boat\n', "line 3: is no CSV"),
    "not doubled.csv": (b'id,caption\n1,a fox\n2,"a "blue" boat"\n', "line 3: is no CSV"),
    "pack.csv": (b"caption\n\"" + b"x" * 100_000, "is no CSV"),
    "pairs.json": (b'[["1.png", "a cat"], ["2.png", "a dog"]]', "that are lists"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_refused_with_its_name_and_why(tmp_path, name):
    raw, said = WRONG[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as refusal:
        load_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value) and said in str(refusal.value), refusal.value
    assert len(str(refusal.value)) < 500


def test_a_folder_and_a_glob_stand_for_their_files(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("two\none\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text("caption\none\n", encoding="utf-8")
    (tmp_path / "sub" / "c.jsonl").write_text('{"caption": "three"}\n', encoding="utf-8")
    (tmp_path / "sub" / ".hidden" / "d.txt").write_text("four\n", encoding="utf-8")
    (tmp_path / "settings.json").write_text('{"caption": 1}', encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = load_prompts(tmp_path)
    assert (found.prompts, found.notice) == (["one", "two", "three"], "1 repeated lines left out")
    assert load_prompts(f"{tmp_path}/*.txt").prompts == ["two", "one"]
    assert load_prompts(f"{tmp_path}/**/*.[jt]*[lt]").prompts == ["two", "one", "three"]
    with pytest.raises(UserError, match="without captions"):
        load_prompts(f"{tmp_path}/*.parquet")
    (tmp_path / "odd[1].txt").write_text("five\n", encoding="utf-8")
    assert load_prompts(tmp_path / "odd[1].txt").prompts == ["five"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="without captions"):
        load_prompts(tmp_path / "empty")
    (tmp_path / "sub" / "more.csv.gz").write_bytes(b"")  # no caption of a folder is left out in silence
    with pytest.raises(UserError, match=r"more\.csv\.gz: is packed"):
        load_prompts(tmp_path)


def test_a_line_without_end_is_refused(tmp_path):
    (tmp_path / "p.txt").touch()
    os.truncate(tmp_path / "p.txt", 2**33)
    with pytest.raises(UserError, match="line 1: is longer"):
        load_prompts(tmp_path / "p.txt")


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").write_bytes(parquet_bytes({"caption": ["a"]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_prompts(Path(tmp_path / "p.parquet"))
