"""A student's folder tells which prompts it was trained on, and the files that its record names are not opened for that.

pytest tests/students/test_trained_prompts.py
"""

import os

from support.runs import PRUNED_CONFIG
from wandistiller.model.config import StudentConfig
from wandistiller.students.trained_prompts import trained_prompts, write_trained_prompts


def student_of(**record: object) -> StudentConfig:
    return StudentConfig.from_dict(PRUNED_CONFIG | {"distillation": record})


def test_digests_tell_trained_prompts_however_their_words_are_spaced(tmp_path):
    write_trained_prompts(tmp_path, ["a red circle", "a blue square", "Wan — 万"])
    asked = ["a red circle", "a  blue square", "a green star", "Wan — 万"]
    known = trained_prompts(tmp_path, student_of(), asked, "elsewhere.txt")
    assert known == {"a red circle", "a  blue square", "Wan — 万"}


def test_without_digests_only_the_very_file_is_known(tmp_path):
    file, other = tmp_path / "prompts.txt", tmp_path / "copy.txt"
    file.write_text("a red circle\n")
    other.write_text("a red circle\n")
    student = student_of(data_path=str(file))
    assert trained_prompts(tmp_path, student, ["a red circle"], str(file)) == {"a red circle"}
    assert trained_prompts(tmp_path, student, ["a red circle"], str(other)) == set()


def test_a_pipe_that_a_record_names_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    student = student_of(data_path=str(tmp_path / "pipe"), extra_prompts="/dev/stdin")
    assert trained_prompts(tmp_path, student, ["a red circle"], str(tmp_path / "prompts.txt")) == set()


def test_a_digest_file_that_is_none_of_ours_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "trained_prompts.sha256")
    assert trained_prompts(tmp_path, student_of(), ["a red circle"], "elsewhere.txt") == set()
