"""The prompts file, whatever an editor made of it, and Wan's cleaning of prompts; diffusers is the oracle of the cleaning."""

import contextlib
import time
from pathlib import Path

import pytest

from wandistiller.errors import UserError
from wandistiller.prompts.prompts import clean_prompt, load_prompts, read_prompts, slug

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "A red fox in fresh snow, golden light",
    "",
    "  two   spaces\u3000and &amp;amp; entities &lt;b&gt; ",
    "cafÃ© façade, Día de los Muertos — “quotes”",
    "word " * 700,
]


def test_the_shipped_file_holds_55_different_prompts_of_usable_length():
    shipped = load_prompts(ROOT / "data" / "static_prompts.txt")
    assert (len(shipped.prompts), shipped.notice) == (55, "")
    assert all(8 <= len(prompt.split()) <= 40 and clean_prompt(prompt) == prompt for prompt in shipped.prompts)


def test_slugs_are_file_names():
    assert slug("A red/blue  circle: ../etc") == "a-red-blue-circle-etc"
    assert slug("?!") == "prompt"
    assert len(slug("word " * 50)) <= 48


@pytest.mark.parametrize(
    ("raw", "prompts", "notice"),
    [
        (b"one\ntwo\n", ["one", "two"], ""),
        (b"one\r\ntwo\rthree", ["one", "two", "three"], ""),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbf# joined file\n", ["one"], ""),
        (b"# note\n\n  \t\n  # indented\none # not a comment\n", ["one # not a comment"], ""),
        (b"b\na\nb\n b  \nb\n", ["b", "a"], "3 repeated lines left out"),
        ("Día\u2028de\u0085 los\n\u3000\n".encode(), ["Día de los"], ""),
    ],
)
def test_any_line_ending_and_bom_blank_lines_comments_and_repeats(tmp_path, raw, prompts, notice):
    path = tmp_path / "prompts.txt"
    path.write_bytes(raw)
    loaded = load_prompts(path)
    assert (loaded.prompts, loaded.notice) == (prompts, notice)


def test_cleaning_equals_diffusers_on_hard_text():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    controls = "".join(chr(code) for code in [*range(0x20), 0x7F, *range(0x80, 0xA1), 0x2028, 0x3000, 0xFEFF])
    hard = [
        *PROMPTS,
        "<b> &amp;amp;lt; &amp;nbsp;x",
        " ".join(controls),
        controls,
        "&amp;lt;&#x1c;b&#x85;c",
        "âœ” donâ€™t ﬁne Ａ",
    ]
    assert [clean_prompt(text) for text in hard] == [prompt_clean(text) for text in hard]


def test_as_many_prompts_of_a_file_as_are_asked_for_are_drawn_by_the_seed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {number}\n" for number in [*range(100), 7]), encoding="utf-8")
    whole, some, more = (read_prompts(path, num_prompts=count, seed=1) for count in (None, 10, 20))
    assert whole.train == load_prompts(path).prompts and whole.lines == ["Prompts: 100 (1 repeated lines left out)"]
    assert more.train[:10] == some.train and len(set(more.train)) == 20
    assert whole.held_out == whole.train[:16] and len(some.held_out) == 16 and not set(some.held_out) & set(some.train)
    assert "10 drawn with seed 1 of 100" in some.lines[0]
    assert set(read_prompts(path, num_prompts=10, seed=2).train) != set(some.train)
    assert read_prompts(path, num_prompts=500).train == whole.train


NO_PROMPTS = {
    "nothing": ("\n \n# only a comment\n", "holds no prompt"),
    "Latin-1": (b"fine\r\nfine\rcaf\xe9\n", "line 3: byte 0xE9"),
    "UTF-16": ("one\n".encode("utf-16"), "line 1: byte 0xFF"),
    "UTF-16 without its mark": ("one\n".encode("utf-16-be"), r"line 1: holds the control character U\+0000"),
    "JSON lines": ('\n{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "a table or JSON; name it .*.jsonl"),
    "JSON": ('[\n {"prompt": "a cat"}\n]\n', "a table or JSON"),
    "a table": ("id\tcaption\n1\ta red fox\n", "lines such as 'id.* a table or JSON"),
    "names of pictures": ("image\nimg_0001.png\nsub dir/img 2.JPG\n", "'img_0001.png': names of files"),
    "addresses": ("https://example.org/1\nhttps://example.org/2\n", "names of files or addresses"),
    "addresses of other kinds": ("s3://bucket/1 a red fox\ngs://bucket/2\n", "names of files or addresses"),
    "Flickr's captions": ("1000.jpg#0\ta red fox\n1000.jpg#1\ta fox\n<img.png> a cat\n", "names of files or addresses"),
    "lists of Python": ("['a red fox', 'a fox']\n['a cat']\n", "a table or JSON"),
    "captions behind names": ("a b/1.png\ta red fox\n2.png a blue boat\n", "names of files or addresses; give the captions, those behind"),
    "a config": ("# musubi\n[general]\nresolution = [960, 544]\ncaption_extension = '.txt'\n", "a config; give the captions"),
    "what stands for a file": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "that was not fetched"),
    "options first": ("a cat\n--prompt a dog --steps 20\n", "line 2: begins with an option, '--prompt a dog"),
    "a line of a book": ("a cat\n" + "x" * 20_001 + "\n", "line 2: is longer than 20,000 letters"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_what_stands_in_place_of_prompts_is_refused_by_its_name(tmp_path, name):
    text, said = NO_PROMPTS[name]
    for file, why in (("prompts.txt", said), ("dataset.toml", "is a config")):
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f"{file}.*{why}"):
            load_prompts(tmp_path / file)


def test_sample_prompts_of_other_trainers_lose_their_options_and_the_screen_says_so(tmp_path):
    lines = [
        "a cat --w 832 --h 480 --n bad quality",
        "a dog -- asleep --",
        "a ship --ar 16:9 --v 6",
        "a {red|blue} hat",
        '"quoted", 1',
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    found = load_prompts(tmp_path / "prompts.txt")
    assert found.prompts == ["a cat", "a dog -- asleep --", "a ship", "a {red|blue} hat", '"quoted", 1']
    assert "2 cut before options such as --w 832" in found.notice and "1 hold {a|b}" in found.notice


@pytest.mark.parametrize(
    "text", ["{" + "|" * 400_000, "__a " * 200_000, "a --w" * 150_000, "a.png " * 150_000, "x=" * 400_000]
)
def test_no_text_takes_the_patterns_long(tmp_path, text):
    (tmp_path / "p.txt").write_text(f"{text}\n{text}b\n", encoding="utf-8")
    start = time.process_time()
    with contextlib.suppress(UserError):
        load_prompts(tmp_path / "p.txt")
    (tmp_path / "a.template.txt").write_text(f"{text[:19_000]}\n", encoding="utf-8")
    with contextlib.suppress(UserError):
        load_prompts(tmp_path / "a.template.txt")
    assert time.process_time() - start < 5
