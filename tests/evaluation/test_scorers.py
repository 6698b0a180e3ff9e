"""Scorers of transformers' real classes judge pictures as their own forward passes and numpy say.

The oracle of cosines are the logits that CLIPModel and SiglipModel themselves return for pictures and texts together, and the
pooled output of Dinov2Model; means, errors and CMMD are loops over numbers.

pytest tests/evaluation/test_scorers.py
"""

import contextlib
import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoProcessor

from support.scorer_models import save_scorer
from wandistiller.errors import UserError
from wandistiller.evaluation.scorers import MODEL_TYPES, cmmd, compare_scores, load_scorer, text_scores

PROMPTS = ["a red circle", "a blue square", "a cat", "rain"]
NUM_SEEDS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, object]]:
    root = tmp_path_factory.mktemp("scorers")
    return {kind: (root / kind, save_scorer(kind, root / kind)) for kind in MODEL_TYPES}


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (len(PROMPTS) * NUM_SEEDS, 48, 48, 3), dtype=np.uint8)


STUDENT, TEACHER = drawn(1), drawn(2)
PICTURES = {"student": STUDENT, "teacher": TEACHER}


def images(pictures: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pictures]


@torch.no_grad()
def cosines_of(model, folder: Path, pictures: np.ndarray) -> np.ndarray:
    """The cosine of each picture to each prompt, taken back from the logits of the whole model."""
    processor = AutoProcessor.from_pretrained(folder)
    slots = model.config.text_config.max_position_embeddings
    given = processor(
        images=images(pictures),
        text=PROMPTS,
        padding="max_length",
        max_length=slots,
        truncation=True,
        return_tensors="pt",
    )
    logits = model(**given).logits_per_image
    if (bias := getattr(model, "logit_bias", None)) is not None:
        logits = logits - bias
    return (logits / model.logit_scale.exp()).numpy()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_cosines_to_prompts_are_those_of_the_models_own_logits(models, kind):
    folder, model = models[kind]
    scorers = [load_scorer(kind, str(folder))]
    found = compare_scores(scorers, PROMPTS, PICTURES, batch_size=5, device="cpu")["scores"][kind]
    own = {}
    for name, pictures in PICTURES.items():
        cosines = cosines_of(model, folder, pictures)
        own[name] = [
            statistics.fmean(cosines[prompt * NUM_SEEDS + seed][prompt] for seed in range(NUM_SEEDS))
            for prompt in range(len(PROMPTS))
        ]
        assert found[name] == pytest.approx(statistics.fmean(own[name]), abs=1e-6)
    student, teacher = (statistics.fmean(own[name]) for name in ("student", "teacher"))
    assert found["ratio"] == (pytest.approx(student / teacher, rel=1e-4) if teacher > 0 else None)
    differences = [a - b for a, b in zip(own["student"], own["teacher"], strict=True)]
    assert found["standard_error_of_difference"] == pytest.approx(statistics.stdev(differences) / 2, rel=1e-3)
    assert found["model"] == str(folder) and found["num_prompts"] == 4


def test_no_share_is_kept_of_a_score_below_zero():
    pictures, texts = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), torch.tensor([[-1.0, 0.0], [-1.0, 0.0]])
    found = text_scores(pictures, pictures, texts)
    assert found["student"] == found["teacher"] == -1 and found["ratio"] is None
    assert text_scores(pictures[:1], pictures[:1], -texts[:1])["standard_error_of_difference"] is None


@torch.no_grad()
def test_a_dino_compares_each_picture_with_the_teachers_of_the_same_noise(models):
    folder, model = models["dino"]
    found = compare_scores([load_scorer("dino", str(folder))], PROMPTS, PICTURES, batch_size=4, device="cpu")
    assert "cmmd" not in found
    processor = AutoImageProcessor.from_pretrained(folder)
    pooled = {
        name: model(**processor(images=images(pictures), return_tensors="pt")).pooler_output.double()
        for name, pictures in PICTURES.items()
    }
    cosines = torch.nn.functional.cosine_similarity(pooled["student"][:, None], pooled["teacher"][None], dim=-1)
    same = [float(cosines[number, number]) for number in range(len(STUDENT))]
    by_prompt = [statistics.fmean(same[start : start + NUM_SEEDS]) for start in range(0, len(same), NUM_SEEDS)]
    scores = found["scores"]["dino"]
    assert scores["cosine"] == pytest.approx(statistics.fmean(same), abs=1e-6)
    assert scores["standard_error"] == pytest.approx(statistics.stdev(by_prompt) / 2, rel=1e-4)


def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.exp(-(math.dist(a, b) ** 2) / 200)


def test_cmmd_is_that_of_its_authors():
    x, y = torch.nn.functional.normalize(torch.randn(2, 9, 7, dtype=torch.float64), dim=-1)
    pairs = list(itertools.product(range(9), range(9)))
    terms = [kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs]
    assert cmmd(x, y) == pytest.approx(1000 * sum(terms) / 81, rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


# ---- what is no scorer ----


def refusal(kind: str, folder: Path | str) -> str:
    with pytest.raises(UserError) as refused:
        load_scorer(kind, str(folder))
    message = str(refused.value)
    assert message.startswith(f"--scorer {kind}=") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("kind", "other"), [("clip", "siglip"), ("siglip", "clip"), ("dino", "clip"), ("clip", "dino")]
)
def test_a_model_of_another_kind_is_refused(models, kind, other):
    message = refusal(kind, models[other][0])
    assert "is a model of type" in message and MODEL_TYPES[kind][0] in message


def removed(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def too_many_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}), encoding="utf-8")


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def another_picture_size(folder: Path) -> None:
    file = folder / "processor_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"height": 32', '"height": 40'), encoding="utf-8")


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    *(
        (kind, removed("*processor_config.json"), "copy it again, with preprocessor_config.json")
        for kind in MODEL_TYPES
    ),
    ("clip", removed("tokenizer*"), "holds no tokenizer"),
    ("siglip", removed("tokenizer*"), "holds no tokenizer"),
    ("clip", removed("*"), "holds no config.json"),
    ("clip", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickles are never"),
    # transformers itself fills missing tensors with random values:
    (
        "dino",
        lambda folder: change_weights(folder, lambda weights: weights.pop("layernorm.weight")),
        "1 of its tensors are missing, the first is layernorm.weight",
    ),
    (
        "dino",
        lambda folder: change_weights(folder, lambda w: w.update({"adapter.weight": w["layernorm.bias"].clone()})),
        "1 tensors that are no part of a dinov2, the first is 'adapter.weight'",
    ),
    ("dino", too_many_layers, "num_hidden_layers is 1000000000"),
    ("dino", cut_short, "copy it again"),
    ("clip", another_picture_size, "cannot be used"),
    ("dino", lambda folder: change_weights(folder, lambda w: w["layernorm.weight"].fill_(math.nan)), "not finite"),
]


@pytest.mark.parametrize(("kind", "damage", "words"), BROKEN)
def test_a_damaged_model_is_refused_in_one_line(models, tmp_path, kind, damage, words):
    folder = shutil.copytree(models[kind][0], tmp_path / kind)
    damage(folder)
    assert words in refusal(kind, folder)


def test_a_config_that_names_code_of_its_own_runs_none(models, tmp_path):
    folder = shutil.copytree(models["dino"][0], tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "dinov2", "auto_map": {"AutoModel": "code.Model", "AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with contextlib.suppress(UserError):
        load_scorer("dino", str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_place_where_nothing_is_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "none", tmp_path / "file"):
        assert "there is no such folder" in refusal("clip", place)
    assert "nobody/no-such-clip: is no file or folder here" in refusal("clip", "nobody/no-such-clip")
