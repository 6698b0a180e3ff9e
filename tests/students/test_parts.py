"""A student's record leads to its teacher from whatever folder one stands in.

Local paths, paths in the clone, hub ids and the low-noise expert are each looked up from elsewhere.
"""

from pathlib import Path

import pytest
import torch

from support.runs import PRUNED_CONFIG, ROOT
from wandistiller.errors import UserError
from wandistiller.evaluation.pair import sampling_of
from wandistiller.files.hub import cached_snapshot
from wandistiller.flags import TeacherFlags
from wandistiller.model.config import StudentConfig
from wandistiller.projection.comfyui import comfyui_sampler
from wandistiller.students.parts import recorded_path, teacher_paths


def student_of(**record: object) -> StudentConfig:
    return StudentConfig.from_dict(PRUNED_CONFIG | {"distillation": record})


def test_a_local_teacher_is_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "here" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    recorded = recorded_path("teacher")
    assert Path(recorded).is_absolute()
    monkeypatch.chdir(tmp_path)
    assert Path(teacher_paths(student_of(teacher_path=recorded), TeacherFlags())[0]) == tmp_path / "here" / "teacher"


def test_what_lies_in_the_clone_is_recorded_so_that_it_may_move_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recorded = recorded_path("data/demo_teacher")
    assert recorded == "./data/demo_teacher"
    monkeypatch.chdir(tmp_path)
    for path in (recorded, "data/demo_teacher"):  # the second as earlier students have it
        assert Path(teacher_paths(student_of(teacher_path=path), TeacherFlags())[0]).samefile(
            ROOT / "data" / "demo_teacher"
        )


def test_a_hub_repository_that_is_only_recorded_is_taken_from_the_local_cache_and_never_fetched(tmp_path):
    hub_id = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert recorded_path(hub_id) == hub_id and recorded_path("mock") == "mock" and recorded_path(None) is None
    with pytest.raises(UserError, match=f"not in the hub's local cache; .* --teacher_path {hub_id} fetches it"):
        teacher_paths(student_of(teacher_path=hub_id, base_model=hub_id), TeacherFlags())
    repository = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers"
    snapshot = repository / "snapshots" / ("0" * 40)
    for file, text in ((snapshot / "model_index.json", "{}"), (repository / "refs" / "main", "0" * 40)):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    assert cached_snapshot(hub_id, tmp_path) == snapshot and cached_snapshot("some/body", tmp_path) is None


def test_a_missing_folder_is_not_taken_for_a_repository_of_its_name():
    with pytest.raises(UserError, match="the teacher this student records is not there; give --teacher_path"):
        teacher_paths(student_of(teacher_path="somebodys/folder"), TeacherFlags())


def test_the_low_noise_expert_is_found_as_the_teacher_is(tmp_path):
    (tmp_path / "high").mkdir()
    (tmp_path / "low").mkdir()
    paths = [str(tmp_path / name) for name in ("high", "low", "gone")]
    assert teacher_paths(student_of(teacher_path=paths[0], teacher_path_low=paths[1]), TeacherFlags()) == tuple(
        paths[:2]
    )
    with pytest.raises(UserError, match="low-noise expert this student records is not there; give --teacher_path_low"):
        teacher_paths(student_of(teacher_path=paths[0], teacher_path_low=paths[2]), TeacherFlags())


def test_a_flag_goes_before_the_record():
    assert teacher_paths(
        student_of(teacher_path="somebodys/folder"), TeacherFlags(teacher_path="a/b", teacher_path_low="c")
    ) == ("a/b", "c")


@pytest.mark.parametrize(
    "record, sampler, teachers, comfyui",
    [
        ({}, "unipc", "unipc", "dpmpp_2m"),
        ({"student_steps": 4}, "euler", "unipc", "euler"),
        ({"teacher_sampler": "euler"}, "euler", "euler", "euler"),
        ({"teacher_sampler": "euler", "student_steps": 2}, "euler", "euler", "euler"),
    ],
)
def test_a_student_of_a_teacher_of_few_steps_is_drawn_by_eulers_method_wherever_it_is(
    record, sampler, teachers, comfyui
):
    config = student_of(**record)
    drawn = [sampling_of(who, config, None, torch.float32, "cpu").sampler for who in ("student", "teacher")]
    assert [*drawn, comfyui_sampler(config)] == [sampler, teachers, comfyui]
