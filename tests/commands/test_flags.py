"""How commands read their flags: fields of a dataclass, either spelling, one line and exit code 2 for a mistake."""

import subprocess
import sys

import pytest

from support.runs import ROOT
from wandistiller.flags import LORA_FLAG, flag, group, number, parse_flags, path, switch


@group("Page")
class PageFlags:
    """A group."""

    page_width: int = flag("pixels", 80, type=number(int, low=1))
    zoom: float = flag("of it", 1.0, type=number(float, above=0))


@group()
class Flags(PageFlags):
    """Flags of a made-up command."""

    student: str = flag("100 % of a folder", required=True, type=path)
    colour: str = flag("of it", "red", choices=["red", "blue"])
    lora: list[tuple[str, float]] | None = flag("a file", **LORA_FLAG)
    dry_run: bool = switch("write nothing")


def read(*words: str) -> Flags:
    return parse_flags(Flags, "made_up.py", "Make something up.", list(words))


def test_flags_become_the_fields_of_their_dataclasses():
    assert read("--student", "a") == Flags(student="a")
    given = read("--student=a-b", "--page-width=7", "--dry-run", "--lora", "x.safetensors:0.5", "--lora", "c:d")
    assert given == Flags(student="a-b", dry_run=True, page_width=7, lora=[("x.safetensors", 0.5), ("c:d", 1.0)])
    assert given == read(
        "--student=a-b", "--page_width", "7", "--dry_run", "--lora", "x.safetensors:0.5", "--lora", "c:d"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: --student"),
        (["--student", " "], "argument --student: is empty; give a path"),
        (["--student", "a", "--colour", "green"], "argument --colour: invalid choice: 'green' (choose from red, blue)"),
        (["--student", "a", "--page-width", "0"], "argument --page_width: '0' must be a whole number at least 1"),
        (["--student", "a", "--page-width", "9" * 5000], "must be a whole number"),
        (["--student", "a", "--page-width", "9" * 30], "is too large; allowed: at most 1e+12"),
        (["--student", "a", "--page-width", "9" * 400], "is too large; allowed: at most 1e+12"),  # no float holds it
        (["--student", "a", "--zoom", "1e300"], "is too large; allowed: at most 1e+18"),
        (["--student", "a", "--zoom", "1e-300"], "is too near to 0; allowed: 0 or at least 1e-18"),
        (["--student", "a", "--zoom", "nan"], "must be a number above 0"),
        (["--student", "a", "--lora", "x:0"], "the scale after the colon must be a number other than 0"),
        (["--student", "a", "--colou", "red"], "unknown flag --colou; did you mean --colour?"),
        (["--model_path", "a"], "unknown flag --model_path; here it is called --student"),
        (["--student", "a", "blue"], "unexpected argument 'blue'; every value follows a --flag"),
        (["--student", "a", "--nproc-per-node", "2"], "--nproc_per_node; it is a flag of torchrun, and comes before"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and len(error) < 600
    assert error.startswith("made_up.py: error: ") and message.replace("'", "") in error.replace("'", "")


def test_help_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "100 % of a folder" in out and "of it (default: red)" in out and "Page: --page_width" in out


def test_a_command_that_a_process_of_another_run_starts_speaks_at_once(tmp_path):
    """As job scripts of torchrun and accelerate do, whose variables say that this is the second process."""
    words = [sys.executable, ROOT / "generate_images.py", "--student", tmp_path / "nowhere", "--prompt", "x"]
    ended = subprocess.run(
        words, env={"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stderr.startswith("error: --student") and ended.stderr.count("\n") == 1


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert path("~/out") == f"{tmp_path}/out" and path("a~b") == "a~b"
    (tmp_path / "~odd").touch()
    assert path("~odd") == "~odd"
