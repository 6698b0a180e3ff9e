"""Mistakes that people make give exit code 2 and one message to act on, without a traceback, and touch nothing.

Wrong flags, configs, prompts files, teachers, encoders and folders are given to the public command.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate_student
import generate_images
import train_distillation
from support.runs import PROMPTS, PRUNED_CONFIG, ROOT, snapshot
from support.wan_folders import write_transformer_folder
from wandistiller.model.config import StudentConfig


@pytest.fixture
def previous(tmp_path):
    """An output folder in which an earlier run left its student, and a person a note."""
    from wandistiller import WanLiteStudent

    folder = tmp_path / "out"
    folder.mkdir()
    WanLiteStudent(StudentConfig.from_dict(PRUNED_CONFIG)).save_pretrained(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    return folder


@pytest.fixture
def refused(run_main, write_config, teachers, previous, tmp_path):
    """Run the trainer with one thing wrong (later flags win) and hold its answer to what is promised."""

    def run(*flags: object, words: list[str], config: object = PRUNED_CONFIG) -> None:
        before, folders = snapshot(previous), set(previous.rglob("*"))
        outcome = run_main(
            train_distillation.main, "--teacher_path", teachers.one, "--student_config", write_config(config),
            "--data_path", PROMPTS, "--prompt_cache", tmp_path / "cache", "--output_dir", previous, "--device", "cpu",
            *flags,
        ).refused(*words)  # fmt: skip
        assert outcome.err.startswith(("error: ", "train_distillation.py: error: "))
        assert snapshot(previous) == before and set(previous.rglob("*")) == folders, "the output folder was touched"

    return run


# ---- flags ----

FLAGS = {
    "unknown": (["--epochs", 3], ["--epochs", "--num_epochs"]),
    "one hyphen": (["-lr", 3], ["-lr", "did you mean --lr?"]),
    "float is negative with exponent": (["--lr", "-1e-5"], ["--lr", "'-1e-5'", "above 0"]),
    "boundary above 1": (["--boundary_ratio", 875], ["--boundary_ratio", "at most 1"]),
    "a trajectory from below": (["--sigma_range", 0, 0.5], ["--sigma_range", "sigma 1"]),
    "sigma_range reversed": (["--sigma_range", 0.9, 0.1], ["--sigma_range", "0.9", "below", "0.1"]),
    "eval prompts not there": (["--eval_prompts", "nowhere.txt", "--eval_every", 5], ["nowhere.txt"]),
    "offline without a cache": (["--offline_teacher"], ["--offline_teacher", "--teacher_cache"]),
    "no such part": (["--cache_part", "3/2", "--teacher_cache", "x"], ["--cache_part", "1 to N"]),
    "features from a cache": (["--teacher_cache", "x", "--feature_loss_weight", 1], ["--feature_loss_weight", "hidden states"]),
    "a cache in use": (["--teacher_cache", "/proc"], ["--teacher_cache", "/proc", "not a teacher cache"]),
    "layers out of range": (["--layers", "0,3"], ["--layers", "0,3", "from 0 to 2"]),
    "layers too many": (["--layers", "0,1,2"], ["--layers", "3 layers", "depth=2"]),
    "device nonsense": (["--device", "gpu"], ["--device", "gpu", "allowed: cpu"]),
    "guidance_scale_2 with one expert": (["--guidance_scale_2", 3], ["--guidance_scale_2", "one expert"]),
    "empty output_dir": (["--output_dir", ""], ["--output_dir", "empty"]),
    "low expert of the mock": (["--teacher_path", "mock", "--teacher_path_low", "x"], ["--teacher_path_low", "mock"]),
}  # fmt: skip


# What other trainers call it, and what is answered
OTHER_NAMES = {
    "--resume": "a run resumes where the same command is typed again",
    "--learning_rate": "here it is called --lr",
    "--lerning_rate=1e-4": "unknown flag --lerning_rate; did you mean --lr?",
    "--learning-rate=1e-4": "unknown flag --learning_rate; here it is called --lr",
    "--resolution": '"image_size" in the file of --student_config',
    "--lora": "a LoRA of the teacher is --teacher_lora FILE[:SCALE]",
    "--blocks_to_swap=20": "--teacher_offload blocks",
    "--network_dim": "here it is called --lora_rank",
    "--distributed": "torchrun --nproc_per_node N",
    "--validation_prompts": "here it is called --sample_prompts",
    "--config_file=x": "here it is called --config",
    "--zzz": "unknown flag --zzz; see --help",
}


@pytest.mark.parametrize("flag", OTHER_NAMES)
def test_a_flag_of_another_trainer_is_answered_with_ours(refused, flag):
    refused(flag, words=["unknown flag", OTHER_NAMES[flag]])


@pytest.mark.parametrize(
    ("command", "flags", "answer"),
    [
        (generate_images, ["--steps", "4"], "here it is called --num_inference_steps"),
        (generate_images, ["--num_images_per_prompt", "4"], "here it is called --num_images"),
        (evaluate_student, ["--num_images", "4"], "here it is called --num_seeds"),
        (generate_images, ["--model_path", "x"], "here it is called --student; the following arguments are required"),
    ],
)
def test_the_answer_is_a_flag_of_the_same_command(run_main, command, flags, answer):
    required = [] if "required" in answer else ["--student", "x", "--prompts_file", "y"]
    run_main(command.main, *required, *flags).refused(answer)


@pytest.mark.parametrize("flags, words", FLAGS.values(), ids=FLAGS)
def test_a_wrong_flag(refused, flags, words):
    refused(*flags, words=words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none(refused):
    refused("--device", "cuda:1", words=["--device", "cuda:1", "allowed: cpu"])


@pytest.mark.parametrize("flag", ["--output_dir", "--prompt_cache"])
def test_a_folder_below_a_file(refused, tmp_path, flag):
    path = tmp_path / "taken"
    path.write_text("mine", encoding="utf-8")
    refused(flag, path / "sub", words=[flag, str(path), "is a file"])
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_new_output_dir_is_not_made_for_a_run_that_cannot_be(refused, tmp_path):
    refused("--output_dir", tmp_path / "new" / "run", "--layers", "0,9", words=["--layers"])
    assert not (tmp_path / "new").exists()


# ---- student_config.json ----


CONFIGS = {
    "broken JSON": ('{"block": "wan",\n "depth": }', ["config.json", "line 2", "JSON"]),
    "unknown key": (PRUNED_CONFIG | {"hiden_size": 1}, ["config.json", '"hiden_size"', '"hidden_size"']),
    "wider than the teacher": (PRUNED_CONFIG | {"hidden_size": 48, "num_heads": 4}, ["hidden_size=48", "24 or less"]),
    "other channels": (PRUNED_CONFIG | {"num_channels": 4}, ["num_channels=4", 'edit the line to "num_channels": 16']),
}


@pytest.mark.parametrize("config, words", CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_config(refused, config, words):
    refused(config=config, words=words)


def test_a_config_that_is_not_there(refused, tmp_path):
    refused("--student_config", tmp_path / "nowhere.json", words=["nowhere.json", "no such file", "config/"])


def test_an_image_size_that_does_not_fit_the_real_vae(refused, teachers, tmp_path):
    folder = tmp_path / "coarse"
    shutil.copytree(teachers.one, folder)
    edit_json(folder / "vae" / "config.json", scale_factor_spatial=16, dim_mult=[1] * 5)
    words = ["image_size=48", "VAE factor 16", "32 or 64"]
    refused("--teacher_path", folder, config=PRUNED_CONFIG | {"image_size": 48}, words=words)


def without_weights(vae: Path) -> None:
    (vae / "diffusion_pytorch_model.safetensors").unlink()


# What is done to the folder of a VAE, and what is said of it before anything is written or trained
WRONG_VAES = {
    "cut short": (lambda vae: truncate(vae / "diffusion_pytorch_model.safetensors"), "is not a whole safetensors file"),
    "no weights": (without_weights, "holds no .safetensors weights"),
    "other factor": (
        lambda vae: edit_json(vae / "config.json", dim_mult=[1, 1], scale_factor_spatial=2),
        "of factor 2",
    ),
    "other latents": (lambda vae: edit_json(vae / "config.json", latents_mean=[0.5] * 16), "has other latents_mean"),
}


@pytest.mark.parametrize("name", WRONG_VAES)
def test_a_vae_that_cannot_be_the_teachers_is_refused_before_training(refused, teachers, tmp_path, name):
    damage, said = WRONG_VAES[name]
    shutil.copytree(teachers.one / "vae", tmp_path / "vae")
    damage(tmp_path / "vae")
    refused("--vae_path", tmp_path / "vae", words=[str(tmp_path / "vae"), said])


@pytest.mark.parametrize("name", ["cut short", "no weights"])
def test_a_teacher_with_a_damaged_vae_is_learnt_from_without_pictures(train, teachers, tmp_path, name):
    damage, said = WRONG_VAES[name]
    shutil.copytree(teachers.one, tmp_path / "teacher")
    damage(tmp_path / "teacher" / "vae")
    outcome = train(tmp_path / "teacher", PRUNED_CONFIG, "--num_samples", 1, "--dry_run")
    assert outcome.code == 0 and "No sample pictures" in outcome.out and said in outcome.out, outcome


# ---- prompts ----


def test_prompts_that_are_no_text_or_not_there_or_a_folder(refused, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a tree\na café\n".encode("latin-1"))
    refused("--data_path", path, words=[str(path), "line 2", "0xE9", "UTF-8"])
    refused("--data_path", tmp_path / "nowhere.txt", words=["nowhere.txt", "No such file", "one prompt a line"])
    (tmp_path / "empty").mkdir()
    refused("--data_path", tmp_path / "empty", words=[str(tmp_path / "empty"), "directory", "one prompt a line"])


# ---- teachers ----


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


# What happens to the transformer's file or to a JSON file of a good pipeline folder, and what the message must say.
DAMAGES = {
    "truncated weights": (truncate, None, ["diffusion_pytorch_model.safetensors", "whole"]),
    "no weights": (Path.unlink, None, ["transformer", ".safetensors"]),
    "encoder of another width": ({"d_model": 32}, "text_encoder/config.json", ["d_model=32", "d_model=20"]),
}  # fmt: skip


@pytest.mark.parametrize("damage, name, words", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_other_teacher(refused, teachers, tmp_path, damage, name, words):
    folder = tmp_path / "damaged"
    shutil.copytree(teachers.one, folder)
    if name is None:
        damage(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    else:
        edit_json(folder / name, **damage)
    refused("--teacher_path", folder, words=[str(folder), *words])


def test_a_hub_id_without_network(refused):
    hub_id = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    refused("--teacher_path", hub_id, words=[hub_id, "hub", "cannot be reached", "local copy"])


def test_a_student_as_teacher_needs_a_text_encoder(refused, previous):
    refused("--teacher_path", previous, words=[str(previous), "--text_encoder_path"])


def test_a_low_expert_of_another_shape(refused, tmp_path):
    write_transformer_folder(tmp_path / "low", layers=2)
    refused("--teacher_path_low", tmp_path / "low", words=["differ in shape"])


def test_a_teacher_without_a_text_encoder_says_which_folder_is_wanted(refused, teachers):
    words = ["--text_encoder_path", "text_encoder/", "tokenizer/", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    refused("--teacher_path", teachers.single_file, config=PRUNED_CONFIG | {"hidden_size": 128}, words=words)


# ---- the same from the shell ----


def test_a_mistake_from_the_shell(tmp_path, previous):
    before = snapshot(previous)
    words = ["--teacher_path", "nowhere/at/all", "--student_config", ROOT / "config" / "demo_student_config.json"]
    argv = [sys.executable, ROOT / "train_distillation.py", *words, "--data_path", PROMPTS, "--output_dir", previous]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "nowhere/at/all: there is no such file or folder" in done.stderr
    assert snapshot(previous) == before


def test_a_stdout_that_cannot_show_a_prompt_does_not_end_a_run():
    code = "import sys; from wandistiller.command_line import run_command; sys.exit(run_command(lambda: print('a 猫')))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a \\u732b\n", "")


@pytest.mark.parametrize("letters", [1, 200_000])
def test_a_reader_that_leaves_is_no_traceback(letters):
    """As in `python train_distillation.py --dry_run | head`, before and after the system's buffer is full."""
    code = "import sys; from wandistiller.command_line import run_command; "
    code += f"sys.exit(run_command(lambda: print('x' * {letters})))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
