"""The pages for people name what exists: files, flags of each command, messages, links; and they stay short.

The checks read the text of README.md, TESTING.md, CONTRIBUTING.md and docs/, and hold it against the files, the `--help` of the
commands and the strings of the source.
"""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = [path.name for path in sorted((ROOT / "wandistiller").iterdir()) if (path / "__init__.py").is_file()]
BYTES = {"README.md": 6144, "TESTING.md": 4096}
PATH = re.compile(r"(?<![\w/.-])(?:wandistiller|tests|docs|config|data|tools|benchmarks)/[\w./-]*\w")
SHORT_PATH = re.compile(rf"`((?:{'|'.join(ROOMS)})/[\w./]*)`")  # of a file in a package, as the list of packages has it
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node \w+) ([\w/]+\.py)((?:\\\n|[^\n`])*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]+")


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def flags_of(script: str) -> set[str]:
    """The flags that a command lists; those of a benchmark or tool are read from its source, which is slow to import."""
    if "/" in script:
        text = (ROOT / script).read_text(encoding="utf-8")
        return set(FLAG.findall(text))
    command = [sys.executable, ROOT / script, "--help"]
    return set(FLAG.findall(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout))


def texts_of(path: Path) -> list[str]:
    """Every string of a module, with a NUL in place of what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@pytest.mark.parametrize(("name", "most"), BYTES.items())
def test_a_person_finishes_these_pages(name, most):
    assert len((ROOT / name).read_bytes()) <= most


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_file_and_every_link_of_a_page_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [path for path in PATH.findall(text) if not list(ROOT.glob(path))]
    missing += [path for path in SHORT_PATH.findall(text) if not (ROOT / "wandistiller" / path).exists()]
    assert not missing


def cells() -> str:
    """The text of the notebook's cells."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"])


@pytest.mark.parametrize("page", [*PAGES, None], ids=[*ids(PAGES), "notebook"])
def test_every_flag_of_a_page_is_one_of_the_command_it_is_given_to(page):
    text = cells() if page is None else page.read_text(encoding="utf-8")
    assert page is not None or len(COMMAND.findall(text)) > 4
    for script, rest in COMMAND.findall(text):
        assert (ROOT / script).is_file(), script
        assert set(FLAG.findall(rest)) <= flags_of(script), f"{script}{rest}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_first_line_of_a_page_is_the_question_that_it_answers(page):
    first = page.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and first.endswith("?")


def test_there_are_nine_pages_and_a_person_can_read_them_all():
    pages = [page for page in PAGES if page.parent == ROOT / "docs"]
    assert len(pages) <= 9 and sum(len(page.read_text(encoding="utf-8").split()) for page in PAGES) <= 14_000


def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent == ROOT / "docs" and f"(docs/{page.name})" not in readme] == []


def test_every_message_of_the_table_is_one_that_the_source_prints():
    files = [*ROOT.glob("*.py"), *(ROOT / "wandistiller").rglob("*.py")]
    texts = "\n".join(text for path in files for text in texts_of(path))
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8").split("## Messages")[1]
    rows = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    messages = [message for row in rows for message in re.findall("`([^`]+)`", row)]
    assert len(messages) > 5
    for message in messages:
        assert re.sub(r"\d+|nan", "\0", message) in texts, message
