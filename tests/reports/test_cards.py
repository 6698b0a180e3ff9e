"""The model card of an export is what the hub reads, and says how the student was made; `huggingface_hub.ModelCard` is the reader."""

import pytest
from huggingface_hub import ModelCard

from support.runs import PRUNED_CONFIG
from wandistiller.files.hub import hub_id
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.projection.exports import published
from wandistiller.reports.cards import export_card, plain

RECORD = {
    "teacher_path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "base_model": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "preset": "Wan2.2-T2V-A14B", "shift": 12.0, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "num_inference_steps": 40,
    "num_prompts": 55, "num_train_steps": 900, "batch_size": 32, "lr": 1e-5, "states": "trajectory",
    "sigma_range": [0.0, 1.0], "init": "projection", "layers": [0, 2],
}  # fmt: skip


def card_of(name: str = "student", **record: object) -> ModelCard:
    """The card of a student with this record, as the hub parses it."""
    config = published(StudentConfig.from_dict(PRUNED_CONFIG | {"distillation": RECORD | record}))
    return ModelCard(export_card(name, config, False, "fp32"))


def test_the_hub_reads_the_card_which_says_how_the_student_was_made():
    card = card_of(teacher_loras=[{"expert": "high", "file": "style.safetensors", "sha256": "0", "scale": 0.8}])
    data, text = card.data, card.text
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "text-to-image", "diffusers")
    assert data.base_model == "Wan-AI/Wan2.2-T2V-A14B-Diffusers" and "wan" in data.tags
    for fact in (
        "| shift | 12.0 |", "| sampling steps | 40 |", "| optimiser steps | 900 |", "| teacher's layers | 0, 2 |",
        "| with the LoRA | style.safetensors at 0.8 |", "| prompts | 55 |",
        f"{count_parameters(StudentConfig.from_dict(PRUNED_CONFIG)).total:,} parameters",
    ):  # fmt: skip
        assert fact in text, fact
    assert "| sampling steps | 4 |" in card_of(student_steps=4).text
    assert "does not draw by itself" in card_of(sigma_range=[0.875, 1.0]).text
    assert "at 32 x 32, 48 x 32 pixels alone" in card_of(image_sizes=["48x32", "32x32"]).text


def test_what_a_record_holds_is_shown_as_it_is_and_never_as_markdown():
    assert plain("a|b\n# c_d\x1b[2J\u009b") == "a\\|b \\# c\\_d \\[2J"
    evil = "<script>alert(1)</script>[x](http://evil.example){{ 7 * 7 }}"
    card = card_of("a_b", base_model=None, preset=evil, states=evil)
    assert "# a\\_b" in card.text and "49" not in card.text
    shown = card.text.replace("\\<", "").replace("\\]", "")  # what stays is markdown
    assert "script>alert" not in shown and "](http://evil" not in shown
    linked = card_of(base_model="a/b) [mine](http://evil.example").text
    assert "\\](http://evil" in linked and "%5Bmine%5D" in linked


@pytest.mark.parametrize(
    "teacher, licence",
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "apache-2.0"),
        ("somebody/wan-tune", "other"),
        ("./data/demo_teacher", "apache-2.0"),
        ("/home/somebody/secret/data/demo_teacher", "other"),
    ],
)
def test_the_licence_is_the_teachers_where_it_is_known_and_its_place_on_this_machine_stays_here(teacher, licence):
    card = card_of(teacher_path=teacher, base_model=hub_id(teacher))
    assert card.data.license == licence and "secret" not in card.content
    assert ("holds for its students" in card.text) == (licence == "other")
