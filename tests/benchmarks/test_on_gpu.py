"""benchmarks/on_gpu.py is walked through without a GPU: every command at tiny size, and the page that it writes.

So no mistyped flag waits for a rented GPU. A part that fails or takes too long must be told, and must not end the others.

pytest tests/benchmarks/test_on_gpu.py
"""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import on_gpu
from support.runs import ROOT


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/on_gpu.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_at_tiny_size(tmp_path):
    done = run("--tiny", "--device", "cpu", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["parts"] == list(on_gpu.PARTS) and document["failed"] == []
    for name in on_gpu.PARTS:
        part = json.loads((tmp_path / f"{name}.json").read_text())
        assert all(run["exit_code"] == 0 for run in part["runs"])
        if name not in ("tests", "demo"):
            assert all(run["document"] for run in part["runs"])


def test_every_flag_of_the_commands_is_one_that_their_scripts_know():
    """The scripts' own --help is the oracle, at the sizes that a GPU gets."""
    helps: dict[str, str] = {}
    for part in on_gpu.PARTS.values():
        for script, *flags in part.commands(False, "cuda"):
            if script == "-m":
                continue
            if script not in helps:
                command = [sys.executable, script, "--help"]
                helps[script] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
                if script.endswith("bench_step.py"):  # it hands on what is not its own
                    command = [sys.executable, "train_distillation.py", "--help"]
                    helps[script] += subprocess.run(
                        command, cwd=ROOT, capture_output=True, text=True, check=True
                    ).stdout
            for flag in flags:
                assert not flag.startswith("--") or flag in helps[script], (script, flag)


def test_a_part_that_fails_or_takes_too_long_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    parts = {
        "slow": on_gpu.Part(
            "?", lambda is_tiny, device: [["-c", "print('begun', flush=True); import time; time.sleep(60)"]]
        ),
        "broken": on_gpu.Part("?", lambda is_tiny, device: [["-c", "raise SystemExit(3)"]]),
        "good": on_gpu.Part("?", lambda is_tiny, device: [["-c", "print('a table'); print('{\"found\": 1}')"]]),
    }
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    assert on_gpu.main(["--device", "cpu", "--tiny", "--minutes", "0.05", "--output_dir", str(tmp_path)]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["failed"] == ["slow", "broken"]
    good = json.loads((tmp_path / "good.json").read_text())
    assert good["runs"][0]["document"] == {"found": 1} and good["runs"][0]["printed"] == "a table"
    assert json.loads((tmp_path / "slow.json").read_text())["runs"][0]["exit_code"] == 124


def test_the_page_holds_the_tables_of_full_size_alone(monkeypatch, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- on_gpu: begin -->\nold\n<!-- on_gpu: end -->\nafter\n")
    monkeypatch.setattr(on_gpu, "PAGE", page)
    machine = {"date": "2026-01-01", "device": "a GPU", "torch": "2", "commit": "abc"}
    for name, is_tiny in (("fp8", False), ("offload", True)):
        one = {"command": f"python {name}.py", "exit_code": 0, "seconds": 1.0, "printed": f"table of {name}"}
        part = machine | {"part": name, "about": "Why?", "is_tiny": is_tiny, "runs": [one]}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    on_gpu.write(tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "table of fp8" in text and "a GPU" in text and "table of offload" not in text and "old" not in text


def test_a_wrong_part_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main(["forwards"])
    assert stopped.value.code == 2
    assert "forwards" in capsys.readouterr().err
