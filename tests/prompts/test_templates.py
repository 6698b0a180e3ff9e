r"""Prompt templates: what each part of the syntax gives, the same prompts for the same seed, and none of the held-out ones.

Expected sets of prompts are written by hand; the held-out rule and the a or an of the shipped templates are checked apart.

pytest tests/prompts/test_templates.py
"""

import collections
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wandistiller.errors import UserError
from wandistiller.prompts.prompts import TextPaths, load_prompts, read_texts
from wandistiller.prompts.templates import TemplatePrompts, Templates, is_held_out

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
        ("{2$$a|b|c}", ["a, b", "a, c", "b, a", "b, c", "c, a", "c, b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("x {-1$$a|b}", ["x", "x a", "x b"]),
        ("x {1-$$ $$a|b}", ["x a", "x b", "x a b", "x b a"]),
        (r"\{a\|b\} \_\_c\_\_ \$ \\", [r"{a|b} __c__ $ \ ".strip()]),
        ("# a comment\n\na cat\n2::a dog\n", ["a cat", "a dog"]),
        ("a snake_case, a __ gap, 10:30, (word:1.2)", ["a snake_case, a __ gap, 10:30, (word:1.2)"]),
    ],
)
def test_the_syntax_that_users_of_stable_diffusion_know(tmp_path, template, prompts):
    found = load_prompts(write(tmp_path, {"a.template.txt": template})).prompts
    assert sorted(found) == sorted(prompts)
    templates = Templates.load(tmp_path)
    assert templates.count == len(prompts)


def test_wildcards_are_lines_of_files_which_lead_to_others(tmp_path):
    files = {
        "a.template.txt": "a __pet__",
        "pet.txt": "cat\n# none\n\n__wild/big_cats__\n{small |}dog\n",
        "wild/big_cats.txt": "lion\n",
    }
    assert load_prompts(write(tmp_path, files)).prompts[:] == ["a cat", "a lion", "a small dog", "a dog"]
    assert load_prompts(tmp_path / "a.template.txt").prompts[:] == ["a cat", "a lion", "a small dog", "a dog"]


WRONG = {
    "unknown": ({"a.template.txt": "\na __cat__"}, "a.template.txt, line 2: there is no wildcard __cat__; it would be a line of "),
    "outside": ({"a.template.txt": "a __b/../../c__"}, "there is no wildcard __b/../../c__"),
    "circle": ({"a.template.txt": "__b__", "b.txt": "x\n__c__", "c.txt": "__b__"}, "c.txt, line 1: __b__ leads back to itself (b -> c -> b)"),
    "open": ({"a.template.txt": "ok\na {b|{c}"}, "a.template.txt, line 2: the { at letter 3 has no }"),
    "close": ({"a.template.txt": "a } b"}, "line 1: a } that closes nothing"),
    "bar": ({"a.template.txt": "a | b"}, "line 1: a | outside of braces"),
    "weight": ({"a.template.txt": "{0::a|b}"}, "a weight of 0"),
    "too many": ({"a.template.txt": "{3$$a|b}"}, "3 to 3 of 2 options cannot be drawn"),
    "backwards": ({"a.template.txt": "{2-1$$a|b}"}, "2 to 1 of 2 options"),
    "variable": ({"a.template.txt": "${x=1}"}, "variables"),
    "deep": ({"a.template.txt": "{" * 60 + "}" * 60}, "more than 50 deep"),
    "no line": ({"a.template.txt": "__b__", "b.txt": "# nothing\n"}, "b.txt: holds no line"),
    "nothing": ({"a.template.txt": "{|}"}, "give no prompt"),
    "control": ({"a.template.txt": "a\n\0"}, "a.template.txt, line 2: holds the control character U+0000"),
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


def test_templates_that_repeat_each_other_without_measure_are_refused(tmp_path):
    files = {f"n{level}.txt": f"__n{level + 1}__ __n{level + 1}__\n" for level in range(40)}
    write(tmp_path, {"a.template.txt": "__n0__\n", "n40.txt": "x\ny\n"} | files)
    with pytest.raises(UserError, match="prompts of more than"):
        load_prompts(tmp_path).prompts[0]
    write(
        tmp_path,
        {"n40.txt": f"{'__n41__' * 2}\n", **{f"n{level}.txt": f"__n{level + 1}__\n" for level in range(40, 60)}},
    )
    with pytest.raises(UserError, match="files deep"):
        load_prompts(tmp_path)


def test_weights_are_how_often_an_option_is_drawn(tmp_path):
    write(
        tmp_path,
        {
            "a.template.txt": "3::{3::red|blue} __n__ __n__ __n__ __n__\ngreen __n__ __n__ __n__ __n__\n",
            "n.txt": MANY["n.txt"],
        },
    )
    drawn = collections.Counter(prompt.split()[0] for prompt in load_prompts(tmp_path).prompts[:4000])
    for colour, share in {"red": 9 / 16, "blue": 3 / 16, "green": 1 / 4}.items():
        assert abs(drawn[colour] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5, drawn


def test_a_prompt_is_a_function_of_seed_and_index_alone(tmp_path):
    templates = Templates.load(write(tmp_path, MANY))
    prompts = TemplatePrompts(templates, seed=3)
    assert prompts.is_endless and len(prompts) == 2**20
    forwards = [prompts[index] for index in range(50)]
    assert [prompts[index] for index in reversed(range(50))][::-1] == forwards == prompts[:50]
    assert prompts[-1] == prompts[2**20 - 1] and forwards != TemplatePrompts(templates, seed=4)[:50]
    code = f"from wandistiller.prompts.prompts import load_prompts; print(load_prompts({str(tmp_path)!r}, seed=3).prompts[:50])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == str(forwards)
    with pytest.raises(IndexError):
        prompts[2**20]


def test_what_is_held_out_is_never_trained_on(tmp_path):
    write(tmp_path, MANY)
    texts = read_texts(TextPaths(str(tmp_path)), is_measured=True, seed=1)
    others = load_prompts(tmp_path, seed=2, held_out=True).prompts[:300]
    for prompt in [*texts.held_out, *others]:
        assert int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 50 == 0
    assert not set(texts.prompts[:5000]) & set(others) and len(texts.held_out) == 16
    assert not any(is_held_out(prompt) for prompt in texts.prompts[:5000])


def test_few_prompts_are_all_trained_on_and_measured_on(tmp_path):
    write(tmp_path, {"a.template.txt": "a {red|blue|green} {cat|dog}"})
    texts = read_texts(TextPaths(str(tmp_path)), is_measured=True, seed=1)
    assert not texts.is_endless and len(texts.prompts) == 6 and list(texts.held_out) == list(texts.prompts)


# ---- the templates that are shipped ----


@pytest.fixture(scope="module")
def shipped() -> TemplatePrompts:
    return TemplatePrompts(Templates.load(SHIPPED))


def test_the_shipped_templates_give_more_than_a_million_different_prompts(shipped):
    """Of n draws among N equally likely prompts n^2 / 2N pairs are alike, so that few pairs tell of many prompts."""
    num_draws = 8000
    repeats = num_draws - len(set(shipped[:num_draws]))
    assert shipped.templates.count > 10**8
    assert repeats < num_draws**2 / (2 * 10**6)


def test_the_shipped_templates_read_well(shipped):
    prompts = shipped[:4000]
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
    named = {SHIPPED / f"{name}.txt" for name in shipped.templates.wildcards}
    assert named == {file for file in SHIPPED.rglob("*.txt") if not file.name.endswith(".template.txt")}
