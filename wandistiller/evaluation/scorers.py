"""Scorers: models of transformers that judge pictures of any world, named by `--scorer KIND=ID_OR_FOLDER`.

    scorer = load_scorer("clip", "openai/clip-vit-large-patch14")
    compare_scores([scorer], prompts, {"student": pictures, "teacher": pictures}, batch_size=16, device="cpu")

A clip or siglip puts pictures and texts into one space, a dino pictures alone. Only safetensors and JSON are read, and a hub id
that was named is the only thing that is fetched.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError, first_line, shown
from wandistiller.evaluation.measures import ratio
from wandistiller.files.checked_json import read_json
from wandistiller.files.hub import fetch, is_hub_id
from wandistiller.files.weights import Weight, all_tensors, weight_files

# What a model of each kind calls itself in its config.json.
MODEL_TYPES = {
    "clip": ("clip",),
    "siglip": ("siglip", "siglip2"),
    "dino": ("dinov2", "dinov2_with_registers", "dinov3_vit"),
}
EXAMPLES = {
    "clip": "openai/clip-vit-large-patch14",
    "siglip": "google/siglip-so400m-patch14-384",
    "dino": "facebook/dinov2-large",
}
_HUB_FILES = ["*.json", "tokenizer*", "merges.txt", "spiece.model", "model.safetensors", "model-*.safetensors"]
# A tokenizer's words are in one of these.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
# CMMD (Jayasumana et al. 2024, arXiv 2401.09603): the width of the Gaussian kernel, and the factor that makes figures readable.
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True)
class Scorer:
    """A model in memory that puts pictures, and texts where it knows any, into a space of directions.

    Attributes:
        kind: "clip", "siglip" or "dino".
        location: the folder or hub id that the person gave.
        model: of transformers, as AutoModel finds its class.
        image_processor, tokenizer: its own, of transformers; a dino has no tokenizer.
    """

    kind: str
    location: str
    model: Any
    image_processor: Any
    tokenizer: Any | None = None

    def embed_pictures(self, pictures: np.ndarray, batch_size: int, device: str) -> Tensor:
        """Return the direction (N, D) of each picture (N, H, W, 3) uint8, of length 1, in float64."""
        from PIL import Image

        def embed(part: np.ndarray) -> Tensor:
            given = self.image_processor(images=[Image.fromarray(picture) for picture in part], return_tensors="pt")
            given = given.to(device)
            if self.kind == "dino":
                return self.model(**given).last_hidden_state[:, 0]  # the class token, (B, D)
            return _pooled(self.model.get_image_features(**given))

        return self._directions(embed, pictures, batch_size, device)

    def embed_texts(self, texts: Sequence[str], batch_size: int, device: str) -> Tensor:
        """Return the direction (N, D) of each text, of length 1, in float64; the end of a long text is cut."""
        slots = self.model.config.text_config.max_position_embeddings

        def embed(part: Sequence[str]) -> Tensor:
            # A SigLIP was trained with every text filled up, and a CLIP does not see what comes after the end of its text.
            given = self.tokenizer(
                list(part), padding="max_length", truncation=True, max_length=slots, return_tensors="pt"
            )
            return _pooled(self.model.get_text_features(**given.to(device)))

        return self._directions(embed, texts, batch_size, device)

    def _directions(
        self, embed: Callable[[Any], Tensor], values: Sequence | np.ndarray, batch_size: int, device: str
    ) -> Tensor:
        self.model.to(device)  # only as long as it is asked, since teacher and student need the room
        with torch.inference_mode():
            parts = [embed(values[start : start + batch_size]) for start in range(0, len(values), batch_size)]
        self.model.to("cpu")
        return torch.nn.functional.normalize(torch.cat(parts).double().cpu(), dim=1)


def _pooled(output: Any) -> Tensor:
    """Return the features of transformers' answer, which version 5 wraps."""
    return output if isinstance(output, Tensor) else output.pooler_output


# ---- scores ----


def compare_scores(
    scorers: Sequence[Scorer], prompts: Sequence[str], pictures: dict[str, np.ndarray], batch_size: int, device: str
) -> dict:
    """Return what the scorers say, as JSON values: "scores" by kind, and "cmmd" where one of them is a CLIP.

    Args:
        prompts: each prompt once.
        pictures: those of the "student" and of the "teacher", (N, H, W, 3) uint8, as many of each prompt as there are noises.
    """
    results: dict = {"scores": {}}
    for scorer in scorers:
        found = {name: scorer.embed_pictures(drawn, batch_size, device) for name, drawn in pictures.items()}
        student, teacher = (found[name].unflatten(0, (len(prompts), -1)) for name in ("student", "teacher"))
        if scorer.kind == "dino":
            scores = picture_scores(student, teacher)
        else:
            scores = text_scores(student, teacher, scorer.embed_texts(prompts, batch_size, device))
        results["scores"][scorer.kind] = {"model": scorer.location, "num_prompts": len(prompts), **scores}
        if scorer.kind == "clip":
            value = cmmd(found["student"], found["teacher"])
            results["cmmd"] = {"model": scorer.location, "num_pictures": len(found["student"]), "value": value}
    return results


def text_scores(student: Tensor, teacher: Tensor, texts: Tensor) -> dict:
    """Return the cosines of pictures to their prompts, and the standard error of the difference of the two over prompts.

    Args:
        student, teacher: directions of pictures, (prompts, seeds, D).
        texts: directions of prompts, (prompts, D).
    """
    own, theirs = ((pictures * texts[:, None]).sum(dim=2).mean(dim=1) for pictures in (student, teacher))
    score, reference = float(own.mean()), float(theirs.mean())
    return {
        "student": score,
        "teacher": reference,
        "ratio": ratio(score, reference) if reference > 0 else None,
        "standard_error_of_difference": standard_error(own - theirs),
    }


def picture_scores(student: Tensor, teacher: Tensor) -> dict:
    """Return the cosine of the student's pictures (prompts, seeds, D) to the teacher's of the same prompt and noise."""
    cosines = (student * teacher).sum(dim=2).mean(dim=1)
    return {"cosine": float(cosines.mean()), "standard_error": standard_error(cosines)}


def standard_error(values: Tensor) -> float | None:
    """Return the standard error of the mean of values (N,); of one value nothing is known."""
    return statistics.stdev(values.tolist()) / len(values) ** 0.5 if len(values) > 1 else None


def cmmd(x: Tensor, y: Tensor) -> float:
    """Return CMMD as its authors' code computes it: the biased estimate of the squared mean discrepancy, times 1000.

    k_xx + k_yy - 2 k_xy with means of exp(-|a - b|^2 / (2 sigma^2)) over all pairs, a picture with itself among them. It is
    larger for fewer pictures, so only figures of as many, and of the same CLIP, compare.
    """

    def kernel(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-torch.cdist(a, b).square() / (2 * CMMD_SIGMA**2)).mean())

    return CMMD_SCALE * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


# ---- loading ----


def load_scorer(kind: str, location: str) -> Scorer:
    """Load a scorer to the CPU in float32, checked to be whole, of its kind, and to answer.

    Raises:
        UserError: there is no such model, it is of another kind, or lacks weights, its processor or its tokenizer.
    """
    flag = f"--scorer {kind}={location}"
    try:
        folder = _find_folder(kind, location)
        scorer = Scorer(kind, location, _load_model(folder), *_load_processor(kind, folder))
        answers = [scorer.embed_pictures(np.zeros((1, 64, 64, 3), np.uint8), 1, "cpu")]
        if kind != "dino":
            answers.append(scorer.embed_texts(["a picture"], 1, "cpu"))
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    except Exception as error:  # transformers wraps a damaged model, image processor or tokenizer in many types
        raise UserError(
            f"{flag}: cannot be used ({first_line(error)}); copy it again, with preprocessor_config.json or processor_config.json "
            "and its tokenizer's files"
        ) from None
    if not all(answer.isfinite().all() for answer in answers):
        raise UserError(f"{flag}: the model answers with values that are not finite; copy it again")
    return scorer


def _find_folder(kind: str, location: str) -> Path:
    """Return the folder of a model, which holds safetensors and the config of its kind."""
    folder = Path(location)
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(location):
            raise UserError(f"there is no such folder; give the folder or hub id of a model, such as {EXAMPLES[kind]}")
        folder = fetch(location, _HUB_FILES, f"the folder of a {kind} model that transformers has saved")
    if not (folder / "config.json").is_file():
        raise UserError(f"holds no config.json; give a {kind} model of transformers, such as {EXAMPLES[kind]}")
    model_type, allowed = read_json(folder / "config.json").get("model_type"), MODEL_TYPES[kind]
    if model_type not in allowed:
        raise UserError(
            f"is a model of type {shown(model_type)}; for {kind} allowed: {', '.join(allowed)}, such as {EXAMPLES[kind]}"
        )
    if not any(folder.glob("model*.safetensors")):
        raise UserError("holds no model.safetensors, and pickles are never opened; give a copy that was saved so")
    return folder


def _load_model(folder: Path) -> Any:
    """Build the model around the tensors of its files; transformers gets no folder to search, and a config that its weights agree with."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    found = all_tensors(weight_files(folder))
    _check_depth(read_json(folder / "config.json"), found)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # nosec B615 # a local folder
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config))
    tensors = {name: Weight(stored).read() for name, stored in found.items()}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told below, in one line
    try:
        # No folder is given, so that transformers renames and fills, and searches nothing.
        model, info = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:  # transformers fills them with random values
        raise UserError(f"{len(missing)} of its tensors are missing, the first is {missing[0]}; copy it again")
    if strangers := sorted(map(str, info["unexpected_keys"])):
        raise UserError(
            f"holds {len(strangers)} tensors that are no part of a {config.model_type}, the first is {shown(strangers[0])}; give a "
            "model as transformers saves it"
        )
    return model.eval()


def _check_depth(config: dict, found: Mapping[str, object]) -> None:
    """Refuse a config of more layers than the weights have, before the model is built."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if layers is not None and not (type(layers) is int and 0 < layers <= len(found)):
            raise UserError(
                f"num_hidden_layers is {shown(layers)}, and its files hold {len(found)} tensors; copy it again"
            )


def _load_processor(kind: str, folder: Path) -> tuple[Any, Any | None]:
    """Return a model's image processor and, where it reads text, its tokenizer."""
    from transformers import AutoImageProcessor, AutoProcessor

    options = {"local_files_only": True, "trust_remote_code": False}
    if kind == "dino":
        return AutoImageProcessor.from_pretrained(folder, **options), None  # nosec B615 # a local folder
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # a tokenizer that knows no word would be made
        raise UserError(f"holds no tokenizer (none of {', '.join(_VOCABULARIES)}); copy it again")
    processor = AutoProcessor.from_pretrained(folder, **options)  # nosec B615 # a local folder
    return processor.image_processor, processor.tokenizer
