r"""Prompt templates: what each part of the syntax gives, the same prompts for the same seed, and none of the held-out ones.

Expected sets of prompts are written by hand; the held-out rule and the a or an of the shipped templates are checked apart.
"""

import collections
import hashlib
import random
import re
from pathlib import Path

import pytest

from wandistiller.errors import UserError
from wandistiller.prompts.prompts import load_prompts, read_prompts
from wandistiller.prompts.templates import Templates, is_held_out

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "data" / "prompt_templates"
MANY = {"one.template.txt": "{__n__|} __n__ __n__ __n__ {red|blue}\n", "n.txt": "\n".join("abcdefghijkl")}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("template", "prompts"),
    [
        ("a {red|blue} cat", ["a red cat", "a blue cat"]),
        ("a {3::red|1.5::blue|} cat", ["a red cat", "a blue cat", "a cat"]),
        ("{a {b|c}|d}", ["a b", "a c", "d"]),
        ("{3$$a|b}", ["a, b", "b, a"]),
        ("{0::a|b}", ["b"]),
        ("{2$$a|b|c}", ["a, b", "a, c", "b, a", "b, c", "c, a", "c, b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("x {-1$$a|b}", ["x", "x a", "x b"]),
        ("x {1-$$ $$a|b}", ["x a", "x b", "x a b", "x b a"]),
        ("a {~red|blue} cat", ["a red cat", "a blue cat"]),
        ("a{ red|} cat{ 2-1}", ["a red cat 2-1", "a cat 2-1"]),
        (r"\{a\|b\} \_\_c\_\_ \$ \\", [r"{a|b} __c__ $ \ ".strip()]),
        ("# a comment\n\na cat\n2::a dog\n", ["a cat", "a dog"]),
        ("# a comment\n// another\na cat", ["a cat"]),
        ("a snake_case, a __ gap, 10:30, (word:1.2)", ["a snake_case, a __ gap, 10:30, (word:1.2)"]),
    ],
)
def test_the_syntax_that_users_of_stable_diffusion_know(tmp_path, template, prompts):
    found = load_prompts(write(tmp_path, {"a.template.txt": template})).prompts
    assert sorted(found) == sorted(prompts)


@pytest.mark.parametrize(
    ("template", "prompts"),
    [
        ("__animals/*__", ["fox", "cow"]),
        ("__animals/**__", ["fox", "cow", "boar"]),
        ("__**/w*__", ["fox", "boar"]),
        ("__animals/ta?e__", ["cow"]),
        ("a __my colors__ hat", ["a red hat"]),
        ("__动物__ 在雪中", ["狐狸 在雪中"]),
        ("__~animals/wild__", ["fox"]),
        ("{2$$ and $$__animals/*__}", ["fox and cow", "cow and fox"]),
        ("a __pet__", ["a cat", "a fox", "a small dog", "a dog"]),
    ],
)
def test_wildcards_are_lines_of_files_of_any_name_and_globs_stand_for_several(tmp_path, template, prompts):
    files = {
        "animals/wild.txt": "fox",
        "animals/tame.txt": "cow",
        "animals/deep/wild.txt": "boar",
        "my colors.txt": "red",
        "动物.txt": "狐狸",
        "pet.txt": "cat\n# none\n\n__animals/wild__\n{small |}dog\n",
    }
    write(tmp_path, files | {"a.template.txt": template})
    assert sorted(load_prompts(tmp_path / "a.template.txt").prompts) == sorted(prompts)


WRONG = {
    "unknown": ({"a.template.txt": "\na __cat__"}, "a.template.txt, line 2: there is no wildcard __cat__; it would be a line of "),
    "outside": ({"a.template.txt": "a __b/../../c__"}, "there is no wildcard __b/../../c__"),
    "circle": ({"a.template.txt": "__b__", "b.txt": "__c__", "c.txt": "__b__"}, "wildcards that lead back to themselves"),
    "open": ({"a.template.txt": "ok\na {b|{c}"}, "a.template.txt, line 2: 1 of its { have no }"),
    "bar": ({"a.template.txt": "a | b"}, "line 1: the | at letter 3 stands outside of braces"),
    "variable": ({"a.template.txt": "${x=1}"}, "'${' begins a variable"),
    "in turn": ({"a.template.txt": "a __@b__"}, "'__@' begins a variable"),
    "number": ({"a.template.txt": "a 2#__b__"}, "'2#__' begins a variable"),
    "tag": ({"a.template.txt": "a <wildcard:b>"}, "'<wildcard:' begins a variable"),
    "editing": ({"a.template.txt": "a [fox:dog:0.5]"}, "'[fox:dog:0.5]' begins a variable"),
    "glob": ({"a.template.txt": "a __b/*__"}, "there is no wildcard __b/*__"),
    "long line": ({"a.template.txt": "__b__", "b.txt": "x" * 30_000}, "b.txt, line 1: is longer than 20,000 letters"),
    "deep": ({"a.template.txt": "{" * 60 + "}" * 60}, "more than 50 deep"),
    "nothing": ({"a.template.txt": "{|}"}, "give no prompt"),
    "latin": ({"a.template.txt": "__b__", "b.txt": "caf\udce9"}, "b.txt, line 1: byte 0xE9 is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_told_with_its_file_and_line(tmp_path, name):
    files, said = WRONG[name]
    for file, text in files.items():
        (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as refusal:
        load_prompts(tmp_path)
    assert said in str(refusal.value) and str(tmp_path) in str(refusal.value) and len(str(refusal.value)) < 500


CHAIN = {f"n{level}.txt": f"__n{level + 1}__ __n{level + 1}__" for level in range(40)}
BOMBS = {
    "words": CHAIN | {"n40.txt": "x\ny\n"},
    "nothing at all": CHAIN | {"n40.txt": "{|}\n"},
    "files behind files": {f"n{level}.txt": f"__n{level + 1}__\n" for level in range(150)} | {"n150.txt": "x"},
    "braces behind files": {f"n{n}.txt": "{" * 45 + f"__n{n + 1}__|b" + "}" * 45 for n in range(14)} | {"n14.txt": "x"},
    "long lines": {"n0.txt": "__n1__" * 3000, "n1.txt": "x" * 19_000},
    "steps": {f"n{n}.txt": "{}" * 1900 + f"__n{n + 1}__" for n in range(90)} | {"n90.txt": "x\ny"},
}  # fmt: skip


@pytest.mark.parametrize("files", BOMBS.values(), ids=BOMBS)
def test_templates_that_repeat_each_other_without_measure_are_refused(tmp_path, files):
    write(tmp_path, {"a.template.txt": "__n0__\n"} | files)
    with pytest.raises(UserError, match="prompts of more than 4000"):
        load_prompts(tmp_path)


WEIGHTED = {
    # Colours by the weights of lines and options: 3/4 3/4, 3/4 1/4, 1/4.
    "3::{3::red|blue}\ngreen\n": {"red": 9 / 16, "blue": 3 / 16, "green": 1 / 4},
    # The second is drawn by the weights of those that are left: P(a b) = 6/10 3/4.
    "{2$$ $$6::a|3::b|1::c}": {"a b": 0.45, "a c": 0.15, "b a": 0.3 * 6 / 7, "c b": 0.1 * 3 / 9},
}


@pytest.mark.parametrize("text", WEIGHTED)
def test_weights_are_how_often_an_option_is_drawn(tmp_path, text):
    templates, generator = Templates(write(tmp_path, {"a.template.txt": text})), random.Random(0)
    found = collections.Counter(templates.draw(generator) for _ in range(4000))
    for prompt, share in WEIGHTED[text].items():
        assert abs(found[prompt] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5, found


def test_the_prompts_are_those_of_their_seed_and_more_of_them_go_on(tmp_path):
    write(tmp_path, MANY)
    some, more, others = (
        read_prompts(tmp_path, num_prompts=count, seed=seed) for count, seed in ((50, 3), (500, 3), (50, 4))
    )
    assert more.train[:50] == some.train and len(set(more.train)) == 500 and others.train != some.train
    assert some.lines == ["Prompts: 50 drawn from templates, with seed 3"]


def test_what_is_held_out_is_never_trained_on(tmp_path):
    write(tmp_path, MANY)
    own = read_prompts(tmp_path, num_prompts=5000, seed=1)
    others = load_prompts(tmp_path, num_drawn=300, seed=2).prompts
    for prompt in [*own.held_out, *others]:
        assert int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 50 == 0
    assert not set(own.train) & set(others) and len(own.held_out) == 16 and len(set(others)) == 300
    assert not any(is_held_out(prompt) for prompt in own.train)


def test_few_prompts_are_all_trained_on_and_measured_on(tmp_path):
    write(tmp_path, {"a.template.txt": "a {red|blue|green} {cat|dog}"})
    prompts = read_prompts(tmp_path, seed=1)
    assert len(prompts.train) == 6 and sorted(prompts.held_out) == sorted(prompts.train)
    assert set(read_prompts(tmp_path, num_prompts=2).train) < set(prompts.train)


# ---- the templates that are shipped ----


@pytest.fixture(scope="module")
def shipped() -> Templates:
    return Templates(SHIPPED)


def drawn(templates: Templates, count: int) -> list[str]:
    generator = random.Random(0)
    return [templates.draw(generator) for _ in range(count)]


def test_the_shipped_templates_read_well(shipped):
    prompts = drawn(shipped, 4000)
    for prompt in prompts:
        assert not re.search(r"[{}|$\\]|__|  | ,|,,|\.\.|， | ，", prompt), prompt
        assert not re.search(r"\b(\w+) \1\b", prompt), prompt
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", prompt):
            starts_with_vowel = word[0].lower() in "aeiou" and not word.startswith(("uni", "one", "eu"))
            assert (article.lower() == "an") == (starts_with_vowel or word == "hourglass"), prompt
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", prompt)) for prompt in prompts) / len(prompts)
    assert 0.12 < chinese < 0.18
    lengths = sorted(map(len, prompts))
    assert lengths[200] < 30 and lengths[-200] > 150


def test_no_line_of_the_shipped_templates_is_there_twice(shipped):
    for file in SHIPPED.rglob("*.txt"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(set(lines)) == len(lines), file
    named = {SHIPPED / f"{name}.txt" for name in shipped.wildcards}
    assert named == {file for file in SHIPPED.rglob("*.txt") if not file.name.endswith(".template.txt")}
