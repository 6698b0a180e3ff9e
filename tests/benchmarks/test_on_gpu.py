"""benchmarks/on_gpu.py: no mistyped flag waits for a rented GPU, and a part that fails or takes too long does not end the others."""

import importlib
import json
import re
import sys

import pytest

from benchmarks import bench_streaming, on_gpu

LINES = [line.split() for _, commands in on_gpu.PARTS.values() for line in commands if not line.startswith("-m ")]


@pytest.mark.parametrize("script", sorted({script for script, *_ in LINES}))
def test_every_flag_of_the_commands_is_one_that_their_scripts_know(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    for name, *words in LINES:
        assert name != script or {word for word in words if word.startswith("--")} <= known, words


def test_the_part_on_streaming_runs_at_tiny_size(capsys):
    words = "--teacher 1.3B --depth 2 --pixels 32 --device cpu --dtype fp32 --batch_size 1 --rounds 1"
    assert bench_streaming.main(words.split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch_size"] for row in found["rows"]] == [1] and found["gib_per_s"] > 0


def test_a_part_that_fails_or_takes_too_long_is_told_on_the_page_and_the_next_one_runs(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- on_gpu: begin -->\nold\n<!-- on_gpu: end -->\nafter\n")
    texts = {"slow": "import time; time.sleep(60)", "broken": "raise SystemExit(3)", "good": "print('a table\\n{}')"}
    parts = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        parts[name] = "?", [str(tmp_path / f"{name}.py")]
    assert on_gpu.main(["--write", "--minutes", "0.1", "--output_dir", str(tmp_path)], parts, page) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["slow", "broken"]
    told = page.read_text()
    assert told.startswith("before\n") and told.endswith("\nafter\n") and "old" not in told
    assert all(word in told for word in ("exit code 124", "exit code 3", "```\na table\n```"))
