"""benchmarks/on_gpu.py is walked through without a GPU: every command at tiny size, and the page that it writes.

So no mistyped flag waits for a rented GPU. A part that fails or takes too long must be told, and must not end the others.

pytest tests/benchmarks/test_on_gpu.py
"""

import functools
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import on_gpu
from support.runs import ROOT


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_at_tiny_size(tmp_path, capsys):
    assert on_gpu.main(["--tiny", "--device", "cpu", "--output_dir", str(tmp_path)]) == 0, capsys.readouterr().out[
        -3000:
    ]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["parts"] == list(on_gpu.PARTS) and document["failed"] == []
    for name in set(on_gpu.PARTS) - {"tests", "demo"}:
        assert all(run["document"] for run in json.loads((tmp_path / f"{name}.json").read_text())["runs"])


@functools.cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    # It hands on what is not its own:
    return done.stdout + (help_of("train_distillation.py") if script.endswith("bench_step.py") else "")


def test_every_flag_of_the_commands_is_one_that_their_scripts_know():
    """The scripts' own --help is the oracle, at the sizes that a GPU gets."""
    for part in on_gpu.PARTS.values():
        for script, *flags in part.commands(False, "cuda"):
            for flag in flags if script != "-m" else []:
                assert not flag.startswith("--") or flag in help_of(script), (script, flag)


def test_a_part_that_fails_or_takes_too_long_does_not_end_the_others(tmp_path, capsys):
    scripts = {
        "slow": "import time; time.sleep(60)",
        "broken": "raise SystemExit(3)",
        "good": "print('a table\\n{\"found\": 1}')",
    }
    parts = {}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
        parts[name] = on_gpu.Part("?", [], [str(tmp_path / f"{name}.py")])
    words = ["--device", "cpu", "--tiny", "--minutes", "0.1", "--output_dir", str(tmp_path)]
    assert on_gpu.main(words, parts) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["failed"] == ["slow", "broken"]
    (good,), (slow,) = (json.loads((tmp_path / f"{name}.json").read_text())["runs"] for name in ("good", "slow"))
    assert good["document"] == {"found": 1} and good["printed"] == "a table" and slow["exit_code"] == 124


def test_the_page_holds_the_tables_of_full_size_alone(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- on_gpu: begin -->\nold\n<!-- on_gpu: end -->\nafter\n")
    machine = {"date": "2026-01-01", "device": "a GPU", "torch": "2", "commit": "abc"}
    for name, is_tiny in (("fp8", False), ("memory", True)):
        one = {"command": f"python {name}.py", "exit_code": 0, "seconds": 1.0, "printed": f"table of {name}"}
        part = machine | {"part": name, "about": "Why?", "is_tiny": is_tiny, "runs": [one]}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    on_gpu.write(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "table of fp8" in text and "a GPU" in text and "table of memory" not in text and "old" not in text


def test_a_wrong_part_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main(["forwards"])
    assert stopped.value.code == 2 and "forwards" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("script", ["on_gpu.py", "bench_memory.py"])
def test_without_a_gpu_a_script_that_needs_one_says_so_in_one_line_and_exits_with_2(script):
    words = [sys.executable, str(ROOT / "benchmarks" / script)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "CUDA GPU" in line
