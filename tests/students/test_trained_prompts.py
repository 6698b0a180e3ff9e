"""A student's folder tells how many prompts it was trained on."""

import os

from wandistiller.students.trained_prompts import count_trained_prompts, write_trained_prompts


def test_digests_tell_trained_prompts_however_their_words_are_spaced(tmp_path):
    write_trained_prompts(tmp_path, ["a red circle", "a blue square", "Wan — 万"])
    for prompts, count in ((["a red circle", "a  blue square", "Wan — 万"], 3), (["a green star"], 0)):
        assert count_trained_prompts(tmp_path, prompts) == count


def test_a_digest_file_that_is_none_of_ours_is_not_read(tmp_path):
    assert count_trained_prompts(tmp_path, ["a red circle"]) == 0
    os.mkfifo(tmp_path / "trained_prompts.sha256")
    assert count_trained_prompts(tmp_path, ["a red circle"]) == 0
