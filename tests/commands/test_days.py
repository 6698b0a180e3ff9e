"""The days of three people, with the commands as they type them in a shell, at small sizes.

A hobbyist with one card, an engineer with several, and a researcher with docs/python.md. Each command has tests of its own; here one
works with what the one before it wrote. diffusers draws with what is exported; a run that nobody stopped is the oracle of one that
was killed.
"""

import importlib
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.loras import diffusers_keys, random_pairs, write
from support.runs import ROOT, read_metrics, same_weights
from support.students import STUDENT, write_teacher
from support.torchrun import start
from support.wan_folders import oracle_velocity, relative_error
from wandistiller import StudentConfig, WanLiteStudent

PROMPT = "a big red ring in the center, on a white background"
SIZES = [(64, 64), (80, 48), (48, 80)]  # width and height of 1:1, 3:2 and 2:3 on a grid of 16 pixels


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The folder in which everything is typed: a Wan, the shape of a student and prompts."""
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path / "wan", seed=5)
    (tmp_path / "student.json").write_text(json.dumps(STUDENT | {"image_size": 64}), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green boat at sea\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def typed(home, run_main) -> Callable[..., str]:
    """Run a command line; return what it printed."""

    def run(line: str, code: int = 0) -> str:
        _, script, *words = shlex.split(line)
        outcome = run_main(importlib.import_module(script.removesuffix(".py")).main, *words)
        assert outcome.code == code and "Traceback" not in outcome.err, outcome.err
        return outcome.err if code else outcome.out

    return run


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_a_hobbyist_goes_from_a_wan_folder_to_a_student_that_learns_on_and_is_exported(typed, home):
    from diffusers import WanTransformer3DModel

    run = "--teacher_path wan --student_config student.json --data_path prompts.txt"
    said = typed(f"python run_production_test.py {run}")
    assert "fits wan" in said and said.endswith("Production Test PASSED\n")
    run += " --sample_prompts 'a lighthouse' 'a cat' --device cpu --output_dir outputs/mine"
    assert "Fits: about" in typed(f"python train_distillation.py {run} --dry_run")
    assert "did you mean --max_steps?" in typed(f"python train_distillation.py {run} --max_step 12", code=2)
    assert not (home / "outputs" / "mine").exists()

    typed(f"python train_distillation.py {run} --max_steps 12 --batch_size 2 --sample_every 6 --num_samples 2")
    mine = home / "outputs" / "mine"
    assert {"loss.png", "samples_over_time.png", "run.yaml"} <= {path.name for path in mine.iterdir()}
    typed(
        "python generate_images.py --student outputs/mine --prompt 'a lighthouse' --output outputs/pictures --device cpu"
    )
    assert pixels(next((home / "outputs" / "pictures").glob("000_a-lighthouse*.png"))).std() > 1
    (home / "others.txt").write_text("a lighthouse\na storm\n", encoding="utf-8")
    measured = "--prompts_file others.txt --num_seeds 1 --frontier_prompts 1 --device cpu"
    assert "In 4 steps, " in typed(f"python evaluate_student.py --student outputs/mine {measured}")
    assert "a lighthouse" in (mine / "gallery.html").read_text(encoding="utf-8")

    typed(
        "python train_distillation.py --teacher_path wan --init_from outputs/mine --data_path others.txt --device cpu "
        "--output_dir outputs/more --max_steps 2 --batch_size 2 --num_samples 0"
    )
    more = StudentConfig.load(home / "outputs" / "more")
    assert (more.distillation["init_from"], more.distillation["num_prompts"]) == (str(mine), 2)
    typed("python export_student.py --student outputs/more --format diffusers --dtype fp32 --output outputs/export")
    theirs = WanTransformer3DModel.from_pretrained(home / "outputs" / "export").eval()
    given = torch.randn(2, 16, 8, 8), torch.tensor([900.0, 250.5]), torch.randn(2, 7, 20), torch.tensor([7, 3])
    with torch.no_grad():
        ours = WanLiteStudent.from_pretrained(home / "outputs" / "more")(*given)
    assert relative_error(oracle_velocity(theirs, *given), ours) <= 1e-5


# ---- an engineer ----


RUN = f"""
teacher_path: wan
teacher_lora: lora.safetensors:0.7
student_config: student.json
data_path: {ROOT}/data/prompt_templates
eval_prompts: {ROOT}/data/prompt_templates
num_prompts: 60
image_sizes: [1:1, "3:2", "2:3"]
teacher_steps: 10
teacher_calls: 8
teacher_cache: answers
replay: 2
batch_size: 2
save_every: 3
eval_every: 0
num_samples: 0
device: cpu
output_dir: outputs/run
"""


def torchrun(line: str, log: Path, kill_after: int | None = None) -> str:
    """Start a command line of torchrun's, kill it once it has taken so many steps, and return what it printed."""
    _, _, count, _, *words = shlex.split(line)
    processes, metrics = start(int(count), words, log), Path("outputs/run/metrics.jsonl")
    while kill_after and not (metrics.is_file() and metrics.read_text().count("\n") >= kill_after):
        time.sleep(0.005)
        assert all(process.is_alive() for process in processes), log.read_text()
    for process in processes:
        if kill_after:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill_after else 0), log.read_text()
    return log.read_text()


def test_an_engineer_trains_with_two_processes_from_a_file_and_a_cache_and_a_kill_changes_nothing(typed, home):
    from diffusers import WanPipeline, WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(home / "wan" / "transformer")
    write(home / "lora.safetensors", diffusers_keys(random_pairs(model, size=0.1)))
    (home / "run.yaml").write_text(RUN, encoding="utf-8")
    command = "torchrun --nproc_per_node 2 train_distillation.py --config"
    assert "Fits: about" in typed("python train_distillation.py --config run.yaml --dry_run")
    assert "other parts are missing" in typed(
        "python train_distillation.py --config run.yaml --batch_size 4 --cache_part 1/2"
    )
    assert "the cache is complete" in typed(
        "python train_distillation.py --config run.yaml --batch_size 4 --cache_part 2/2"
    )

    # Step 6 has waited for the checkpoint of step 3:
    torchrun(f"{command} run.yaml --offline_teacher", home / "log.txt", kill_after=7)
    said = torchrun(f"{command} run.yaml --offline_teacher", home / "log.txt")
    assert re.search("Resuming from step [36] ", said) and "Asking" not in said and " templates" in said
    # The file beside the student repeats its run, and nobody stops it there:
    torchrun(f"{command} outputs/run/run.yaml --output_dir outputs/again", home / "again.txt")
    run, again = home / "outputs" / "run", home / "outputs" / "again"
    assert same_weights(run, again)
    told = [
        [(line["step"], line["loss"], line["teacher_calls"]) for line in read_metrics(folder)]
        for folder in (run, again)
    ]
    assert told[0] == told[1] and len(told[0]) == StudentConfig.load(run).distillation["num_train_steps"]

    record = StudentConfig.load(run).distillation
    assert record["image_sizes"] == [f"{width}x{height}" for width, height in SIZES]
    assert [(lora["file"], lora["scale"]) for lora in record["teacher_loras"]] == [("lora.safetensors", 0.7)]
    width, height = SIZES[1]
    typed(
        f"python generate_images.py --student outputs/run --prompt '{PROMPT}' --width {width} --height {height} "
        "--model teacher --num_inference_steps 2 --output outputs/teacher --device cpu"
    )
    assert pixels(next((home / "outputs" / "teacher").glob("000*.png"))).shape == (height, width, 3)
    said = typed("python export_student.py --student outputs/run --format pipeline --output outputs/pipeline")
    pipeline = WanPipeline.from_pretrained(home / "outputs" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        PROMPT, num_frames=1, guidance_scale=1.0, num_inference_steps=int(re.search(r"num_inference_steps=(\d+)", said)[1]),
        width=width, height=height, output_type="np", generator=torch.Generator().manual_seed(0),
    ).frames[0][0]  # fmt: skip
    assert drawn.shape == (height, width, 3) and np.isfinite(drawn).all() and drawn.std() > 0.005


def test_a_student_of_the_teachers_own_shape_has_nothing_to_learn_at_any_size(typed, home):
    """It starts as the teacher with its LoRA: what it learns from, what both draw and what is scored must say so at once."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(home / "wan" / "transformer")
    write(home / "lora.safetensors", diffusers_keys(random_pairs(model, size=0.1)))
    own = STUDENT | {"image_size": 64, "hidden_size": 24, "depth": 3, "num_heads": 2, "ffn_dim": 40}
    (home / "student.json").write_text(json.dumps(own), encoding="utf-8")
    typed(
        "python train_distillation.py --teacher_path wan --teacher_lora lora.safetensors:0.7 --student_config student.json "
        "--data_path prompts.txt --teacher_steps 4 --image_sizes 1:1 3:2 --guidance_scale 1 --lr 1e-12 --optimizer adamw "
        "--feature_loss_weight 0 --max_steps 6 --batch_size 2 --num_samples 0 --device cpu --output_dir outputs/same"
    )
    same = home / "outputs" / "same"
    assert max(line["loss"] for line in read_metrics(same)) < 1e-9
    measured = "--prompts_file prompts.txt --num_prompts 2 --num_seeds 1 --frontier_prompts 0 --device cpu"
    for width, height in SIZES[:2]:
        typed(f"python evaluate_student.py --student outputs/same {measured} --size {width}x{height}")
        results = json.loads((same / "evaluation.json").read_text(encoding="utf-8"))
        assert results["endpoint"]["latent_relative_error"] < 1e-5


# ---- a researcher ----


def test_a_researcher_types_the_page_on_python_and_every_command_takes_the_student(typed, home):
    for name in ("data", "config"):
        (home / name).symlink_to(ROOT / name)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)), {"__name__": "page"})
    student = home / "outputs" / "mine"
    record = StudentConfig.load(student).distillation
    assert record["num_train_steps"] == 50 and "student_steps" not in record
    results = json.loads((student / "evaluation.json").read_text(encoding="utf-8"))
    assert results["num_prompts"] == 2 and (student / "gallery.html").is_file()
    typed(
        "python generate_images.py --student outputs/mine --prompt 'a red circle' --output drawn --num_inference_steps 2"
    )
    typed("python export_student.py --student outputs/mine --format original --output mine.safetensors")
