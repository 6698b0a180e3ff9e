"""What a run wrote and somebody has damaged since is refused in one message, and leaves nothing behind.

Weights and embeddings that are no numbers, pipes, folders and links in the place of files,
names that are too long, values of thousands of characters.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate_student
import export_student
import generate_images
import train_distillation
from support.runs import PRUNED_CONFIG, at_most, weights_of
from support.students import train_student, write_teacher

MAX_MESSAGE = 500  # characters


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A teacher, a student of it and a text file of other prompts; to be read only."""
    root = tmp_path_factory.mktemp("house")
    write_teacher(root / "teacher", seed=5)
    train_student(root, root / "teacher")
    (root / "other.txt").write_text("a photo of a cat\na cathedral at dusk\n", encoding="utf-8")
    return root


@pytest.fixture
def own(house, tmp_path) -> Path:
    """The student alone, to break."""
    return shutil.copytree(house / "student", tmp_path / "student")


def command_of(name: str, house: Path, student: Path, output: Path) -> tuple:
    """A command's main and its words, for a student."""
    where = ["--student", student, "--output", output]
    drawn, small = ["--device", "cpu", "--prompt_cache", house / "cache"], "--num_seeds 1 --frontier_prompts 0"
    return {
        "generate": (generate_images.main, *where, *drawn, "--prompt", "a red circle", "--num_inference_steps", 1),
        "evaluate": (evaluate_student.main, *where, *drawn, "--prompts_file", house / "other.txt", *small.split()),
        "export": (export_student.main, *where, "--format", "diffusers"),
        "pipeline": (export_student.main, *where, "--format", "pipeline"),
    }[name]


def assert_refused(outcome, *words: str) -> None:
    assert len(outcome.refused("error: ", *words).err) < MAX_MESSAGE


@pytest.mark.parametrize(
    "name, value", [("generate", torch.nan), ("evaluate", torch.inf), ("export", -torch.inf), ("pipeline", torch.nan)]
)
def test_a_student_whose_weights_are_no_numbers_is_refused_and_leaves_no_folder(
    house, own, tmp_path, run_main, name, value
):
    weights = weights_of(own)
    weights["proj_out.weight"][0, 0] = value
    save_file(weights, own / "diffusion_model.safetensors")
    outcome = run_main(*command_of(name, house, own, tmp_path / "new" / "out"))
    assert_refused(outcome, "diffusion_model.safetensors: proj_out.weight holds numbers that are not finite")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["not a number", "another dtype"])
def test_an_embedding_that_is_no_number_is_never_learnt_from(house, tmp_path, run_main, caplog, damage):
    cache = shutil.copytree(house / "cache", tmp_path / "cache")
    for shard in cache.rglob("*.safetensors"):
        rows = load_file(shard)
        changed = {name: row.half() if damage == "another dtype" else row * torch.nan for name, row in rows.items()}
        save_file(changed, shard)
    flags = ["--teacher_path", house / "teacher", "--student_config", house / "config.json", "--prompt_cache", cache]
    flags += ["--data_path", house / "prompts.txt", "--max_steps", 1, "--device", "cpu", "--num_samples", 0]
    outcome = run_main(train_distillation.main, *flags, "--output_dir", tmp_path / "out")
    assert outcome.code == 0 and "encoded again" in caplog.text


@pytest.mark.parametrize("part", ["tokenizer/tokenizer.json", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "pipeline"])
def test_a_damaged_encoder_leaves_no_folder(house, own, tmp_path, run_main, part, name):
    teacher = shutil.copytree(house / "teacher", tmp_path / "teacher")
    (teacher / part).write_bytes(b"{}")
    output = tmp_path / "new" / "out"
    if name == "train":
        words = ["--student_config", house / "config.json", "--data_path", house / "prompts.txt", "--device", "cpu"]
        command = (train_distillation.main, *words, "--output_dir", output)
    else:
        command = command_of(name, house, own, output)
    cache = [] if name == "pipeline" else ["--prompt_cache", tmp_path / "cache"]
    outcome = run_main(*command, "--teacher_path", teacher, *cache)
    if name == "pipeline" and outcome.code == 0:
        return  # an export copies these files as they are
    assert_refused(outcome, part.split("/")[0])
    assert not (tmp_path / "new").exists() and not (tmp_path / "cache").exists()


def test_a_folder_that_was_there_stays_though_it_is_empty(house, tmp_path, run_main):
    (tmp_path / "out").mkdir()
    teacher = shutil.copytree(house / "teacher", tmp_path / "teacher")
    (teacher / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    words = ["--student_config", house / "config.json", "--data_path", house / "prompts.txt", "--device", "cpu"]
    words += ["--teacher_path", teacher, "--prompt_cache", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    assert_refused(run_main(train_distillation.main, *words), "tokenizer")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("file", ["student_config.json", "diffusion_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(house, own, tmp_path, run_main, file):
    (own / file).unlink()
    os.mkfifo(own / file)
    with at_most(20):
        outcome = run_main(*command_of("generate", house, own, tmp_path / "out"))
    assert_refused(outcome, file, "Not a file but a pipe")


@pytest.mark.parametrize("file", ["evaluation.json", "gallery.html", "teacher_vs_student.png"])
def test_a_folder_in_the_place_of_a_result_is_refused_before_anything_is_measured(house, own, tmp_path, run_main, file):
    (own / file).mkdir()
    outcome = run_main(*command_of("evaluate", house, own, own))
    assert_refused(outcome, f"{file} there was not written by", "move it away")
    assert "relative velocity error" not in outcome.out


@pytest.mark.parametrize(
    "name, kind", [("checkpoints", "dangling"), ("metrics.jsonl", "circle"), ("student_config.json", "circle")]
)
def test_links_that_lead_nowhere_are_set_aside_by_a_new_run(train, teachers, tmp_path, name, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "nowhere" if kind == "dangling" else name)
    train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, "--save_every", 1).ok()
    (aside,) = (tmp_path / "out").glob("replaced-*")
    assert (aside / name).is_symlink() and (tmp_path / "out" / "checkpoints" / "step_00000001.json").is_file()


@pytest.mark.parametrize(
    "flag", ["--output_dir", "--student_config", "--teacher_path", "--data_path", "--prompt_cache"]
)
@pytest.mark.parametrize("kind", ["long", "circle"])
def test_a_path_that_cannot_be_is_answered_in_one_line(train, teachers, tmp_path, flag, kind):
    path = tmp_path / ("n" * 300)
    if kind == "circle":
        path = tmp_path / "circle"
        path.symlink_to("circle")
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, flag, path)
    assert_refused(outcome)
    assert path.name[:20] in outcome.err


def test_a_value_of_thousands_of_characters_is_cut_in_the_middle_of_a_message(train, teachers, own, run_main, house):
    values = json.loads((own / "student_config.json").read_text(encoding="utf-8"))
    for text in ("x" * 10_000, "a b " * 3000):
        (own / "student_config.json").write_text(json.dumps(values | {"block": text}), encoding="utf-8")
        outcome = run_main(*command_of("generate", house, own, own / "out"))
        assert_refused(outcome, "student_config.json", "block=", 'nearest: "')
        outcome = train(teachers.one, PRUNED_CONFIG, "--teacher_dtype", text)
        assert outcome.code == 2 and len(outcome.err) < 2 * MAX_MESSAGE and "--teacher_dtype" in outcome.err
