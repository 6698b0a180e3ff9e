"""tools/check_comfyui.py compares what a ComfyUI draws, says why one does not, and ends the process that it started.

A small server that speaks ComfyUI's HTTP API stands in for it: it keeps the noise as it is, which is what a student draws whose
velocity is 0, and shifts it by a known amount where it is asked to. ComfyUI itself is no dependency; docs/export.md
has what the tool said of real ones.

pytest tests/tools/test_check_comfyui.py
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_comfyui  # noqa: E402


@pytest.fixture
def check(run_main, tmp_path, monkeypatch):
    """Run the tool on the stand-in with two random students that have learnt to do nothing; the environment steers it."""
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "comfyui_stand_in.py", folder / "main.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PROCESS", str(tmp_path / "process"))

    def cases(flags):
        drawn = [replace(check_comfyui.random_case(channels, flags.seed), steps=3) for channels in (16, 48)]
        for case in drawn:
            for name, parameter in case.student.named_parameters():
                if name.startswith("proj_out"):
                    torch.nn.init.zeros_(parameter)
        return drawn

    monkeypatch.setattr(check_comfyui, "prepare_cases", cases)

    def run(*flags: object, **environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return run_main(check_comfyui.main, folder, *flags)

    return run


def assert_ended(tmp_path: Path) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)


def test_latents_are_compared_and_the_process_is_ended(check, tmp_path):
    outcome = check("--seed", 3)
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out.splitlines()[-1])
    assert said["comfyui"] == "stand-in" and set(said["workflows"].values()) == {"accepted"}
    assert [result["student"] for result in said["results"]] == ["random, 16 channels", "random, 48 channels"]
    for result in said["results"]:
        assert set(result["errors"]) >= {
            "fp32, euler/simple",
            "fp32, uni_pc/simple",
            "bf16, euler/simple",
            "fp8, euler/simple",
        }
        assert max(result["errors"].values()) < 1e-5
    assert_ended(tmp_path)


def test_an_error_is_relative_to_what_is_drawn_here(check):
    outcome = check(SHIFTED="0.5")
    errors = json.loads(outcome.out.splitlines()[-1])["results"][0]["errors"]
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert errors["fp32, euler/simple"] == pytest.approx(float(0.5 * noise.numel() ** 0.5 / noise.norm()), rel=1e-4)


def test_a_file_that_is_refused_is_told_and_the_rest_goes_on(check, tmp_path):
    outcome = check(REFUSED="Value not in list")
    assert outcome.code == 0
    said = json.loads(outcome.out.splitlines()[-1])
    reason = "the workflow is refused: Prompt outputs failed validation; UNETLoader: Value not in list (unet_name)"
    assert [result["refused"] for result in said["results"]] == [reason] * 2 and set(said["workflows"].values()) == {
        reason
    }
    assert_ended(tmp_path)


def test_a_comfyui_that_does_not_start_is_one_sentence(check, run_main, tmp_path):
    outcome = check(DEAD="no module named torchsde")
    assert outcome.code == 1 and "ended with exit code 1: no module named torchsde" in outcome.err
    assert "Traceback" not in outcome.err
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "holds no main.py"), ("nowhere", "there is no such folder")):
        outcome = run_main(check_comfyui.main, tmp_path / folder)
        assert outcome.code == 2 and message in outcome.err
