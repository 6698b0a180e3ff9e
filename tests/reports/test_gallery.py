"""gallery.html opens from disk in a browser: sorted, filtered, harmless whatever a prompt holds, and whole without scripts.

The browser is the distribution's Chromium, driven by Playwright; without either its tests are skipped. What is on the page is
held against pictures and measures that these tests make up.

pytest tests/reports/test_gallery.py
"""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wandistiller.evaluation import measures
from wandistiller.evaluation.experiment import Drawn, PromptMeasures, measure_prompts
from wandistiller.files.output_folder import set_aside_previous_student
from wandistiller.reports import gallery
from wandistiller.reports.gallery import Evaluated, gallery_page, try_to_write_gallery

HOSTILE = "</h3><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & \"quoted\""
PROMPTS = ["a red circle", "a blue square", HOSTILE]
DISTANCES, SHARPNESS = [0.2, 0.9, 0.1], [0.5, 0.7, 0.9]
ROWS = [
    {
        "who": "student",
        "steps": 8,
        "cost": 0.07,
        "endpoint": 0.5,
        "teacher_steps": 3.4,
        "at_least": False,
        "times_cheaper": 2.3,
    },
    {"who": "teacher", "steps": 2, "endpoint": 0.8},
    {"who": "teacher", "steps": 10, "endpoint": 0.1},
]
RESULTS = {
    "endpoint": {"latent_relative_error": 0.5, "psnr_db": 20.0},
    "frontier": {"rows": ROWS, "recommended_steps": 8, "num_prompts": 3, "num_seeds": 2},
    "noise": dict.fromkeys(["mean_error", "noise_error", "cosine", "gain", "teacher_noise", "norm_ratio"], 0.25),
    "high_frequency_energy": {"student": 1.0, "teacher": 2.0, "ratio": 0.5},
    "cost": {},
}
ABOUT = {"num_prompts": 3, "num_seeds": 2, "num_inference_steps": 20, "student_steps": 20, "num_trained_prompts": 0}


def evaluated(prompts: list[str] = PROMPTS, num_seeds: int = 2, side: int = 8) -> Evaluated:
    """Pictures of one colour each, so that a tile tells which one it is."""
    count = len(prompts) * num_seeds
    colors = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, side, side, 3), np.uint8)
    known = {"psnr_db": 20.0, "right_student": None, "right_teacher": None}
    by_prompt = [
        PromptMeasures(latent_distance=DISTANCES[n % 3], sharpness=SHARPNESS[n % 3], **known)
        for n in range(len(prompts))
    ]
    return Evaluated(
        about=ABOUT,
        results=RESULTS,
        prompts=prompts,
        measures=by_prompt,
        seeds=list(range(7, 7 + count)),
        teacher=colors + 100,
        student=colors * 2 + 90,
    )


def run_folder(root: Path) -> Path:
    """A run's folder with metrics and three sample pictures, one of them damaged."""
    (root / "run" / "samples").mkdir(parents=True)
    lines = [
        {"step": step, "loss": 1 / step, "velocity_error": {"teacher_states": 0.5} if step % 5 == 0 else None}
        for step in range(1, 11)
    ]
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for step, shade in ((2, 20), (10, 200)):
        Image.new("RGB", (60, 20), (shade,) * 3).save(root / "run" / "samples" / f"step_{step:06d}.png")
    (root / "run" / "samples" / "step_000004.png").write_bytes(b"no picture")
    return root / "run"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """A gallery in a folder that was copied to another place, of which the first is gone."""
    root = tmp_path_factory.mktemp("gallery")
    folder = run_folder(root)
    assert try_to_write_gallery(folder, evaluated(), folder) == folder / "gallery.html"
    shutil.copytree(folder, root / "else where" / "run#2")
    shutil.rmtree(folder)
    return root / "else where" / "run#2" / "gallery.html"


@pytest.fixture
def opened(browser, page_file):
    """Open the gallery as a person does; returns the page and the requests that it made."""
    contexts = []

    def open_page(**settings):
        contexts.append(browser.new_context(**settings))
        page, requests = contexts[-1].new_page(), []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        return page, requests

    yield open_page
    for context in contexts:
        context.close()


def shown_prompts(page) -> list[str]:
    # inner_text is empty for a card that is not laid out because it is far below
    return [card.text_content() for card in page.locator(".card:visible h3").all()]


# ---- in a browser ----


def test_the_worst_prompt_comes_first_by_the_chosen_measure_and_a_filter_hides_the_others(opened):
    page, requests = opened()
    assert shown_prompts(page) == [PROMPTS[1], PROMPTS[0], PROMPTS[2]]  # the largest distance first
    page.select_option("#order", "sharpness")
    assert shown_prompts(page) == PROMPTS  # the smallest similarity first
    page.select_option("#order", "psnr_db")
    assert shown_prompts(page) == PROMPTS  # equal ones as in the file
    page.fill("#filter", "BLUE a")
    assert shown_prompts(page) == [PROMPTS[1]] and "1 of 3" in page.inner_text("#count")
    assert [url for url in requests if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in requests) == 1, "the page itself, and nothing beside it"


def test_a_prompt_with_a_script_is_text(opened):
    page, _ = opened()
    assert page.title() == "run: teacher and student"
    assert HOSTILE in shown_prompts(page)
    assert page.locator("script").count() == 1
    # A script that came into the page all the same would not run:
    page.evaluate(
        "() => { const s = document.createElement('script'); s.text = 'document.title = 1'; document.body.append(s) }"
    )
    assert page.title() == "run: teacher and student"


def test_the_slider_shows_one_sample_picture_at_a_time_and_the_damaged_one_is_left_out(opened):
    page, _ = opened()
    visible = page.locator(".frame:visible")
    assert [visible.count(), visible.get_attribute("data-step")] == [1, "10"]
    page.focus("#frame")
    page.keyboard.press("Home")
    assert [visible.count(), visible.get_attribute("data-step"), page.inner_text("#step")] == [1, "2", "2"]


def test_without_scripts_everything_is_there_in_the_order_of_the_file(opened):
    page, _ = opened(java_script_enabled=False)
    assert shown_prompts(page) == PROMPTS
    assert page.locator(".frame:visible").count() == 2
    assert page.locator("#order, #filter, #frame").locator("visible=true").count() == 0
    assert page.locator(".plot svg:visible").count() == 1


# ---- the page as text ----


def tiles_of(page: str) -> list[np.ndarray]:
    uris = re.findall(r'<td><img loading="lazy" src="data:image/webp;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")) for uri in uris]


def test_small_pictures_are_kept_exactly_and_the_difference_is_brighter(tmp_path):
    values = evaluated()
    tiles = tiles_of(gallery_page(values, tmp_path))
    for prompt in range(3):
        for noise in range(2):
            teacher, student, difference = (tiles[6 * prompt + 2 * row + noise] for row in range(3))
            np.testing.assert_array_equal(teacher, values.teacher[2 * prompt + noise])
            np.testing.assert_array_equal(student, values.student[2 * prompt + noise])
            away = abs(int(teacher[0, 0, 0]) - int(student[0, 0, 0]))
            assert away > 0 and (difference == 3 * away).all()


def test_many_prompts_have_smaller_tiles_and_many_noises_are_cut(tmp_path):
    assert gallery.tile_side(100) == 512
    for num_prompts in (1_000, 10_000):
        side = gallery.tile_side(6 * num_prompts)
        assert 32 <= side < 200 and 6 * num_prompts * side**2 <= gallery.MAX_PIXELS
    page = gallery_page(evaluated(["a"], num_seeds=10), tmp_path)
    assert len(tiles_of(page)) == 3 * 8 and "2 more noises of each prompt" in page


def test_every_picture_has_a_text_and_a_far_too_large_sample_is_left_out(tmp_path):
    folder = run_folder(tmp_path)
    Image.new("1", (13_000, 13_000)).save(folder / "samples" / "step_000011.png")
    page = gallery_page(evaluated(), folder)
    texts = re.findall(r'<img [^>]*alt="([^"]+)"', page)
    assert len(texts) == page.count("<img ") == 3 * 3 * 2 + 2  # prompts, rows, noises; sample pictures but the odd ones
    assert "Sample pictures after 2 steps" in texts[0] and "teacher, seed 9: a blue square" in texts


def test_a_page_needs_neither_metrics_nor_samples_and_a_lone_step_is_enough(tmp_path):
    page = gallery_page(evaluated(), tmp_path)
    assert "<h2>Training</h2>" not in page and page.count('class="card"') == 3
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\nno line\n', encoding="utf-8")
    assert "<svg" in gallery_page(evaluated(), tmp_path)


@pytest.mark.parametrize("loss", ["0", "-1e308", "1e-320", f"{10**300}", "NaN", "0.1"])
def test_odd_metrics_cost_at_most_their_chart(tmp_path, loss):
    lines = [
        f'{{"step": {step}, "loss": {value}, "loss_by_sigma": [{", ".join([value] * 10)}], "velocity_error": {{"teacher_states": {value}}}}}'
        for step, value in ((1, loss), (2, "1.0"), (9_007_199_254_740_991, "3"))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    plot = gallery_page(evaluated(), tmp_path).split('class="plot"')[1].split("<h2>Prompts")[0]
    assert "held-out states" in plot and "sigma 0.9-1.0" in plot and "nan" not in plot.lower()


def test_a_file_of_a_person_is_neither_replaced_nor_moved(tmp_path, capsys):
    file = tmp_path / "gallery.html"
    file.write_text("my holidays", encoding="utf-8")
    assert try_to_write_gallery(tmp_path, evaluated(), tmp_path) is None
    assert set_aside_previous_student(tmp_path) is None
    assert file.read_text(encoding="utf-8") == "my holidays" and "stays as it is" in capsys.readouterr().out
    file.unlink()
    assert try_to_write_gallery(tmp_path, evaluated(), tmp_path) == file
    assert (set_aside_previous_student(tmp_path) / "gallery.html").is_file() and not file.exists()


# ---- the measures of each prompt ----


def test_the_distances_of_the_prompts_make_up_the_distance_of_all():
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(6, 4, 3, 3, generator=generator) for _ in range(2)]
    pictures = [np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8) for seed in range(2)]
    student, teacher = (Drawn(*both) for both in zip(latents, pictures, strict=True))
    right = [{"correct": prompt == "b"} for prompt in "aabbcc"]
    rows = measure_prompts(replace(student, verdicts=right), replace(teacher, verdicts=right), 2)
    whole = measures.endpoint_error(*latents)
    assert np.mean([row.latent_distance**2 for row in rows]) == pytest.approx(whole**2)
    assert [row.right_student for row in rows] == [0, 1, 0]
    assert np.mean([row.psnr_db for row in rows]) == pytest.approx(measures.psnr(*reversed(pictures)))
    same = measure_prompts(teacher, teacher, 2)
    assert [(row.latent_distance, row.sharpness) for row in same] == [(0, 1)] * 3
