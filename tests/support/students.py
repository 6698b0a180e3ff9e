"""What the tests of sampling commands share: a tiny pipeline that paints with contrast, and a student of it."""

import json
from pathlib import Path

import torch

import train_distillation
from support.runs import PRUNED_CONFIG
from support.wan_folders import write_pipeline_folder

PROMPTS = ["a red circle", "a blue square on the left, on a white background"]

STUDENT = PRUNED_CONFIG


def write_teacher(folder: Path, **shape) -> Path:
    """A tiny pipeline whose VAE paints with contrast: an untrained one answers with grey, which would hide mistakes."""
    from diffusers import AutoencoderKLWan

    write_pipeline_folder(folder, **shape)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(12)
    vae.save_pretrained(folder / "vae")
    return folder


def train_student(folder: Path, teacher: Path, *flags: str, **changes) -> Path:
    """A student that train_distillation.py itself saved after two steps."""
    (folder / "config.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(STUDENT | changes), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    paths = {"teacher_path": teacher, "student_config": folder / "config.json", "data_path": folder / "prompts.txt"}
    paths |= {"prompt_cache": folder / "cache", "output_dir": folder / "student"}
    argv = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    assert train_distillation.main([*argv, "--max_steps", "2", "--device", "cpu", *flags]) == 0
    return folder / "student"
