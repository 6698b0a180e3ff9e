"""Scorers: models of transformers that judge pictures of any world, named by `--scorer KIND=ID_OR_FOLDER`.

A clip or siglip puts pictures and texts into one space, a dino pictures alone; `scores.py` says what is made of that. Only
safetensors and JSON are read, and a hub id that was named is the only thing that is fetched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError, first_line, shown
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
_HUB_FILES = [
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]
# A tokenizer's words are in one of these.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


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

    @property
    def reads_text(self) -> bool:
        return self.tokenizer is not None

    @property
    def is_published_cmmd(self) -> bool:
        """Whether this has the shape of CLIP ViT-L/14 at 336 pixels, which published CMMD figures are made with."""
        if self.kind != "clip":
            return False
        config = self.model.config
        vision = config.vision_config
        shape = vision.hidden_size, vision.patch_size, vision.image_size, config.projection_dim
        return shape == (1024, 14, 336, 768)

    @property
    def num_text_slots(self) -> int:
        """The tokens of a text that the model reads; the rest is cut."""
        return self.model.config.text_config.max_position_embeddings

    def embed_pictures(self, pictures: np.ndarray, batch_size: int, device: str) -> np.ndarray:
        """Return the direction (N, D) of each picture (N, H, W, 3) uint8, of length 1."""
        from PIL import Image

        def embed(part: np.ndarray) -> Tensor:
            given = self.image_processor(images=[Image.fromarray(picture) for picture in part], return_tensors="pt")
            given = given.to(device)
            if self.kind == "dino":
                return self.model(**given).last_hidden_state[:, 0]  # the class token, (B, D)
            return _pooled(self.model.get_image_features(**given))

        return self._directions(embed, pictures, batch_size, device)

    def embed_texts(self, texts: Sequence[str], batch_size: int, device: str) -> np.ndarray:
        """Return the direction (N, D) of each text, of length 1."""

        def embed(part: Sequence[str]) -> Tensor:
            # A SigLIP was trained with every text filled up, and a CLIP does not see what comes after the end of its text.
            given = self.tokenizer(
                list(part), padding="max_length", truncation=True, max_length=self.num_text_slots, return_tensors="pt"
            )
            return _pooled(self.model.get_text_features(**given.to(device)))

        return self._directions(embed, texts, batch_size, device)

    def num_cut(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the model reads."""
        return sum(len(ids) > self.num_text_slots for ids in self.tokenizer(list(texts), verbose=False)["input_ids"])

    def _directions(
        self, embed: Callable[[Any], Tensor], values: Sequence | np.ndarray, batch_size: int, device: str
    ) -> np.ndarray:
        with _moved(self.model, device), torch.inference_mode():
            parts = [embed(values[start : start + batch_size]) for start in range(0, len(values), batch_size)]
            found = torch.cat(parts).double().cpu().numpy()  # (N, D)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def _pooled(output: Any) -> Tensor:
    """Return the features of transformers' answer, which version 5 wraps."""
    return output if isinstance(output, Tensor) else output.pooler_output


@contextmanager
def _moved(model: torch.nn.Module, device: str) -> Iterator[None]:
    """Keep a model on a device only as long as it is asked, since teacher and student need the room."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def load_scorer(kind: str, location: str) -> Scorer:
    """Load a scorer to the CPU in float32, checked to be whole and of its kind.

    Raises:
        UserError: there is no such model, it is of another kind, or lacks weights, its processor or its tokenizer.
    """
    flag = f"--scorer {kind}={location}"
    folder = _find_folder(kind, location, flag)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{flag}: holds no config.json; give a {kind} model of transformers, such as {EXAMPLES[kind]}")
    model_type = read_json(config_path).get("model_type")
    if model_type not in MODEL_TYPES[kind]:
        raise UserError(
            f"{flag}: is a model of type {shown(model_type)}; for {kind} allowed: {', '.join(MODEL_TYPES[kind])}, such as "
            f"{EXAMPLES[kind]}"
        )
    if not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{flag}: holds no model.safetensors, and pickles are never opened; give a copy that was saved so"
        )
    image_processor, tokenizer = _load_processor(kind, folder, flag)
    scorer = Scorer(kind, location, _load_model(folder, flag), image_processor, tokenizer)
    _try_out(scorer, flag)
    return scorer


def _try_out(scorer: Scorer, flag: str) -> None:
    """Refuse parts that do not go together, before any picture is drawn for them."""
    try:
        answers = [scorer.embed_pictures(np.zeros((1, 64, 64, 3), np.uint8), 1, "cpu")]
        if scorer.reads_text:
            answers.append(scorer.embed_texts(["a picture"], 1, "cpu"))
    except Exception as error:  # a model, its image processor and its tokenizer fail to fit in many ways
        raise UserError(f"{flag}: the model does not answer ({first_line(error)}); copy it again") from None
    if not all(np.isfinite(answer).all() for answer in answers):
        raise UserError(f"{flag}: the model answers with values that are not finite; copy it again")


def _find_folder(kind: str, location: str, flag: str) -> Path:
    path = Path(location)
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(location):
        raise UserError(
            f"{flag}: there is no such folder; give the folder or hub id of a model, such as {EXAMPLES[kind]}"
        )
    return fetch(location, _HUB_FILES, f"the folder of a {kind} model that transformers has saved")


def _load_model(folder: Path, flag: str) -> Any:
    """Build the model around the tensors of its files; transformers gets no folder to search, and a config that its weights agree with."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told below, in one line
    try:
        found = all_tensors(weight_files(folder))
        _check_depth(read_json(folder / "config.json"), found, flag)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # nosec B615 # a local folder
        with torch.device("meta"):
            kind = type(AutoModel.from_config(config))
        tensors = {name: Weight(stored).read() for name, stored in found.items()}
        # No folder is given, so that transformers renames and fills, and searches nothing.
        model, info = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    except UserError as error:
        raise UserError(f"{flag}: {str(error).removeprefix(f'{flag}: ')}") from None
    except Exception as error:  # transformers wraps a bad config in its own types
        raise UserError(f"{flag}: the model cannot be loaded ({first_line(error)}); copy it again") from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:  # transformers fills them with random values
        raise UserError(f"{flag}: {len(missing)} of its tensors are missing, the first is {missing[0]}; copy it again")
    if strangers := sorted(map(str, info["unexpected_keys"])):
        raise UserError(
            f"{flag}: holds {len(strangers)} tensors that are no part of a {config.model_type}, the first is {shown(strangers[0])}; give a "
            "model as transformers saves it"
        )
    return model.eval()


def _check_depth(config: dict, found: Mapping[str, object], flag: str) -> None:
    """Refuse a config of more layers than the weights have, before the model is built."""
    most = len(found)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if layers is not None and not (type(layers) is int and 0 < layers <= most):
            raise UserError(
                f"{flag}: num_hidden_layers is {shown(layers)}, and its files hold {most} tensors; copy it again"
            )


def _load_processor(kind: str, folder: Path, flag: str) -> tuple[Any, Any | None]:
    """Return a model's image processor and, where it reads text, its tokenizer."""
    from transformers import AutoImageProcessor, AutoProcessor

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        if kind == "dino":
            return AutoImageProcessor.from_pretrained(folder, **options), None  # nosec B615 # a local folder
        if not any((folder / name).is_file() for name in _VOCABULARIES):  # a tokenizer that knows no word would be made
            raise FileNotFoundError(f"none of {', '.join(_VOCABULARIES)} is there")
        processor = AutoProcessor.from_pretrained(folder, **options)  # nosec B615 # a local folder
        return processor.image_processor, processor.tokenizer
    except Exception as error:  # what is missing decides which of many types this is
        what = "image processor" if kind == "dino" else "image processor and tokenizer"
        raise UserError(
            f"{flag}: its {what} cannot be loaded ({first_line(error)}); they lie beside the weights as "
            "preprocessor_config.json or processor_config.json, and tokenizer files"
        ) from None
