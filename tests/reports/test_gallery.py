"""gallery.html: pictures first, the farthest from the teacher first of all, numbers below; harmless whatever a prompt holds.

What is on the page is held against pictures and measures that these tests make up; html.parser reads it.
"""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from wandistiller.evaluation.experiment import Drawn, PromptMeasures
from wandistiller.reports import gallery
from wandistiller.reports.gallery import gallery_page

HOSTILE = "</h2><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & \"quoted\""
PROMPTS = ["a red circle", "a blue square", HOSTILE]
DISTANCES = [0.2, 0.9, math.nan]
WORTH = {"teacher_steps": 3.4, "at_least": False, "times_cheaper": 2.3}
ROWS = [
    {"who": "student", "steps": 8, "cost": 0.07, "seconds": 0.5, "endpoint": 0.5, **WORTH},
    {"who": "teacher", "steps": 2, "cost": 0.1, "seconds": 1, "endpoint": 0.8},
    {"who": "teacher", "steps": 10, "cost": 0.5, "seconds": 5, "endpoint": 0.1},
]
RESULTS = {
    "endpoint": {"latent_relative_error": 0.5},
    "frontier": {"rows": ROWS, "recommended_steps": 8, "num_prompts": 3, "num_seeds": 2},
    "noise": dict.fromkeys(["norm_ratio", "cosine", "gain"], 0.25),
    "cost": {},
}
ABOUT = {"num_prompts": 3, "num_inference_steps": 20, "student_steps": 20}


def evaluated(folder: Path, prompts: list[str] = PROMPTS, num_seeds: int = 2, side: int = 8) -> tuple:
    """Pictures of one colour each, so that a tile tells which one it is."""
    count = len(prompts) * num_seeds
    colors = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, side, side, 3), np.uint8)
    by_prompt = [PromptMeasures(DISTANCES[number % 3], (0.5, 1.0)) for number in range(len(prompts))]
    experiment = SimpleNamespace(prompts=prompts, seeds=list(range(7, 7 + count)), num_seeds=num_seeds)
    drawn = (Drawn(None, pictures) for pictures in (colors + 100, colors * 2 + 90))
    return RESULTS | ABOUT | {"student": folder, "num_seeds": num_seeds}, experiment, by_prompt, *drawn


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of each h2."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.headings, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "h2"
        if self.inside:
            self.headings.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "h2"

    def handle_data(self, data):
        if self.inside:
            self.headings[-1] += data


def test_pictures_come_first_the_farthest_prompt_before_all_and_numbers_below(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}), encoding="utf-8")
    text = gallery_page(*evaluated(tmp_path))
    page = Page(text)
    assert page.headings == [PROMPTS[1], PROMPTS[0], PROMPTS[2], "Numbers", "Frontier", "Training"]
    assert text.index("In 8 steps the student is as near") < text.index(f">{PROMPTS[1]}<")
    assert text.count("<svg") == 2 and '<th scope="col">better</th>' in text
    assert "distance 0.9, drawn right: student 50%, teacher 100%" in text


def test_a_prompt_with_a_script_is_text_and_nothing_is_loaded_or_run(tmp_path):
    page = Page(gallery_page(*evaluated(tmp_path)))
    assert HOSTILE in page.headings and not [tag for tag, _ in page.tags if tag == "script"]
    (policy,) = [own["content"] for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src" not in policy
    pictures = [own for tag, own in page.tags if tag == "img"]
    assert len(pictures) == 3 * 2 * 2 and all(own["src"].startswith("data:image/webp") for own in pictures)
    assert {own["alt"] for own in pictures} >= {"teacher, seed 9: a blue square", f"student, seed 12: {HOSTILE}"}
    assert not [own for tag, own in page.tags if tag in ("a", "link") and not own["href"].startswith("#")]


def test_small_pictures_are_kept_exactly(tmp_path):
    values = evaluated(tmp_path)
    uris = re.findall(r'src="data:image/webp;base64,([^"]+)"', gallery_page(*values))
    tiles = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")) for uri in uris]
    expected = [drawn.pictures[2 * number + seed] for number in (1, 0, 2) for drawn in values[-2:] for seed in (0, 1)]
    np.testing.assert_array_equal(tiles, expected)


def test_many_prompts_have_smaller_tiles_and_many_noises_are_cut(tmp_path):
    assert gallery.tile_side(100) == 512
    for num_prompts in (1_000, 10_000):
        side = gallery.tile_side(6 * num_prompts)
        assert 32 <= side < 200 and 6 * num_prompts * side**2 <= gallery.MAX_PIXELS
    page = gallery_page(*evaluated(tmp_path, ["a"], num_seeds=10))
    assert page.count("<img ") == 2 * 8 and "2 more noises of each prompt" in page


@pytest.mark.parametrize("loss", ["0", "-1e308", "1e-320", f"{10**300}", "NaN", "0.1"])
def test_odd_metrics_cost_at_most_their_plot(tmp_path, loss):
    lines = [
        f'{{"step": {step}, "loss": {value}, "loss_by_sigma": [{", ".join([value] * 10)}], "held_out": {{"velocity_error": {value}}}}}'
        for step, value in ((1, loss), (2, "1.0"), (9_007_199_254_740_991, "3"))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(["no line", *lines]), encoding="utf-8")
    plot = gallery_page(*evaluated(tmp_path)).split("<h2>Training</h2>")[1]
    assert "held-out velocity error" in plot and "nan" not in plot.lower()
