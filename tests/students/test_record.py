"""A student's record holds what it may hold, or the student is refused by the name of the entry."""

import json

import pytest

from support.runs import PRUNED_CONFIG
from wandistiller.errors import UserError
from wandistiller.students.record import load_shape

C = PRUNED_CONFIG["num_channels"]


@pytest.mark.parametrize(
    "entry, value",
    [
        ("shift", 0),
        ("shift", "5"),
        ("shift", float("inf")),
        ("guidance_scale", -1),
        ("num_inference_steps", 10**6),
        ("student_steps", True),
        ("teacher_sampler", "ddim"),
        ("sigma_range", [1, 0]),
        ("teacher_path", 5),
        ("teacher_path", "a\0b"),
        ("base_model", "x" * 5000),
        ("teacher_loras", [{"expert": "middle", "file": "a", "sha256": "b", "scale": 1.0}]),
        ("teacher_loras", [{"expert": "high", "file": "a", "sha256": "b", "scale": "much"}]),
        ("image_sizes", []),
        ("image_sizes", ["64"]),
        ("latents_mean", [0.0] * (C - 1)),
        ("latents_std", [0.0] * C),
    ],
)
def test_an_entry_that_cannot_be_is_refused_by_name(entry, value, tmp_path):
    config = PRUNED_CONFIG | {"distillation": {entry: value}}
    (tmp_path / "student_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf'student_config.json: its "distillation" record: {entry} is .*; allowed: '):
        load_shape(tmp_path)


def test_entries_of_later_versions_and_missing_ones_do_no_harm(tmp_path):
    config = PRUNED_CONFIG | {"distillation": {"of_a_later_version": [1], "shift": None}}
    (tmp_path / "student_config.json").write_text(json.dumps(config))
    assert load_shape(tmp_path).distillation["of_a_later_version"] == [1]
