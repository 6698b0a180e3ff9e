"""The model card of a student's folder is what the hub reads, and says how the student was made.

`huggingface_hub.ModelCard` is the reader. Paths of the machine stay out of a card, and a card that a person wrote
stays.
"""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG
from wandistiller.files.hub import hub_id
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.reports.cards import plain, try_to_write_model_card

RECORD = {
    "teacher_path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "base_model": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "preset": "Wan2.2-T2V-A14B", "shift": 12.0, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "num_inference_steps": 40,
    "num_prompts": 55, "num_train_steps": 900, "batch_size": 32, "lr": 1e-5, "states": "trajectory",
    "sigma_range": [0.0, 1.0], "init": "projection", "layers": [0, 2],
}  # fmt: skip


def write_folder(folder: Path, **record: object) -> ModelCard:
    """A folder with a config of this record, and its card as the hub parses it."""
    folder.mkdir(exist_ok=True)
    config = StudentConfig.from_dict(PRUNED_CONFIG | {"distillation": RECORD | record})
    (folder / "student_config.json").write_text(config.to_json(), encoding="utf-8")
    return ModelCard.load(try_to_write_model_card(folder))


def links(card: ModelCard) -> list[str]:
    return [part.split(")")[0] for part in card.text.split("](")[1:]]


def test_the_hub_reads_the_card_which_says_how_the_student_was_made(tmp_path):
    card = write_folder(tmp_path)
    data, text = card.data, card.text
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "text-to-image", "wandistiller")
    assert data.base_model == "Wan-AI/Wan2.2-T2V-A14B-Diffusers" and "wan" in data.tags
    for fact in (
        "| shift | 12.0 |", "| guidance | 4 and 3 |", "| sampling steps | 40 |", "| optimiser steps | 900 |",
        "| teacher's layers | 0, 2 |", f"{count_parameters(StudentConfig.from_dict(PRUNED_CONFIG)).total:,} parameters",
    ):  # fmt: skip
        assert fact in text, fact
    few = write_folder(tmp_path, student_steps=4).text
    assert "in 4 steps (the teacher takes 40)" in few and "| sampling steps | 4 |" in few
    assert "does not draw by itself" in write_folder(tmp_path, sigma_range=[0.875, 1.0]).text


def test_what_a_record_holds_is_shown_as_it_is_and_never_as_markdown(tmp_path):
    assert plain("a|b\n# c_d\x1b[2J\u009b") == "a\\|b \\# c\\_d \\[2J"
    evil = "<script>alert(1)</script>[x](http://evil.example){{ 7 * 7 }}"
    card = write_folder(tmp_path / "a_b", teacher_path=f"x|y{evil}", base_model=None, preset=evil, states=evil)
    assert "# a\\_b" in card.text and "49" not in card.text
    shown = card.text.replace("\\<", "").replace("\\]", "")  # what stays is markdown
    assert "script>alert" not in shown and "](http://evil" not in shown
    linked = write_folder(tmp_path / "c", base_model="a/b) [mine](http://evil.example").text
    assert "\\](http://evil" in linked and "%5Bmine%5D" in linked


def test_only_files_that_are_there_are_linked(tmp_path):
    here = [link for link in links(write_folder(tmp_path)) if not link.startswith("https:")]
    assert here == []
    (tmp_path / "samples").mkdir()
    for name in ("samples/step_000002.png", "samples/step_000010.png", "loss.png", "teacher_vs_student.png"):
        (tmp_path / name).write_bytes(b"")
    here = [link for link in links(write_folder(tmp_path)) if not link.startswith("https:")]
    assert here == ["samples/step_000010.png", "loss.png"], "nobody says of which student the comparison is"


@pytest.mark.parametrize(
    "teacher, licence",
    [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "apache-2.0"), ("somebody/wan-tune", "other"), ("./data/demo_teacher", "apache-2.0"), ("/a/b", "other")],
)  # fmt: skip
def test_the_licence_is_the_teachers_where_it_is_known(tmp_path, teacher, licence):
    card = write_folder(tmp_path, teacher_path=teacher, base_model=hub_id(teacher))
    assert card.data.license == licence
    assert ("holds for its students" in card.text) == (licence == "other")


def test_where_a_teacher_lay_on_this_machine_stays_here_and_its_name_alone_gives_no_licence(tmp_path):
    card = write_folder(tmp_path, teacher_path="/home/somebody/secret/data/demo_teacher", base_model=None)
    assert "| teacher | demo\\_teacher |" in card.text and "secret" not in card.text
    assert card.data.license == "other"


def test_a_card_that_cannot_be_written_is_told_and_does_not_fail_the_run(train, teachers, tmp_path):
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 1)
    assert outcome.code == 0 and "was not written by WanDistiller" in outcome.out and "Done: 1 steps" in outcome.out


@pytest.mark.parametrize("text", ["{", "[]", '{"num_prompts": 3}'])
def test_a_damaged_evaluation_is_left_out(tmp_path, text):
    write_folder(tmp_path)
    (tmp_path / "evaluation.json").write_text(text, encoding="utf-8")
    assert "## Evaluation" not in write_folder(tmp_path).text


def test_a_card_that_a_person_wrote_stays(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert try_to_write_model_card(tmp_path) is None
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_a_run_writes_its_card_and_measuring_the_student_adds_the_table(train, teachers, tmp_path, run_main):
    import evaluate_student

    flags = ["--guidance_scale", 1, "--num_samples", 1, "--max_steps", 2, "--eval_every", 2]
    outcome = train(teachers.one, IDENTITY_CONFIG, *flags)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "out"
    card = ModelCard.load(folder / "README.md")
    assert all((folder / link).is_file() for link in links(card)) and len(links(card)) == 2
    assert "--config run.yaml" in card.text and str(teachers.one) not in card.text
    assert "## Evaluation" not in card.text and "Held out, at the end: relative velocity error" in card.text

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n", encoding="utf-8")
    flags = ["--student", folder, "--prompts_file", prompts, "--prompt_cache", teachers.prompt_cache, "--device", "cpu"]
    flags += ["--num_seeds", 1, "--num_inference_steps", 3]
    assert run_main(evaluate_student.main, *flags, "--output", tmp_path / "elsewhere").code == 0
    assert ModelCard.load(folder / "README.md").text == card.text, "its folder holds no evaluation"
    assert run_main(evaluate_student.main, *flags).code == 0
    measured = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    text = ModelCard.load(folder / "README.md").text
    assert "on 2 held-out prompts, noises of each: 1," in text and "teacher_vs_student.png" in text
    parameters = measured["cost"]["parameters"]
    # Another student than was measured has no figures yet:
    outcome = train(teachers.one, IDENTITY_CONFIG, "--guidance_scale", 1, "--max_steps", 3, "--save_every", 3)
    assert outcome.code == 0
    assert "## Evaluation" not in ModelCard.load(folder / "README.md").text
    assert f"| parameters | {parameters['student']:,} | {parameters['teacher']:,} | 1 |" in text
