"""benchmarks/on_gpu.py: no mistyped flag waits for a rented GPU, and a part that fails or takes too long does not end the others.

pytest tests/benchmarks/test_on_gpu.py
"""

import functools
import json
import subprocess
import sys

from benchmarks import bench_streaming, on_gpu
from support.runs import ROOT


@functools.cache
def help_of(script: str) -> str:
    command = [sys.executable, script, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_flag_of_the_commands_is_one_that_their_scripts_know():
    for _, commands in on_gpu.PARTS.values():
        for script, *flags in (command.split() for command in commands):
            for flag in flags if script != "-m" else []:
                assert not flag.startswith("--") or flag in help_of(script), (script, flag)


def test_the_part_on_streaming_runs_at_tiny_size(capsys):
    words = "--teacher 1.3B --depth 3 --pixels 32 --device cpu --dtype fp32 --batch_size 1 2 --rounds 1"
    assert bench_streaming.main(words.split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch_size"] for row in found["rows"]] == [1, 2] and found["gib_per_s"] > 0


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
