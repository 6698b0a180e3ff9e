"""Write all of a diffusers WanPipeline folder but its transformer: VAE, text encoder, tokenizer, scheduler and index.

The parts come from the teacher, and may come from a stranger: files, keys and classes that are known are written, and nothing else.
"""

import inspect
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandistiller.errors import UserError, shown
from wandistiller.files.atomic import write_json
from wandistiller.files.checked_json import read_json
from wandistiller.model.config import StudentConfig
from wandistiller.sampling.sampler import SamplingOptions, wan_scheduler
from wandistiller.wan.names import teacher_record

# What a part's folder holds: weights, their index, and settings of JSON whose keys are known.
FILES = {
    "vae": re.compile(
        r"config\.json|diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors|diffusion_pytorch_model\.safetensors\.index\.json"
    ),
    "text_encoder": re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"),
    "tokenizer": re.compile(r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|spiece\.model"),
}
# Library and class of the text parts: what a Wan may name, the released Wans' first.
CLASSES = {"text_encoder": ["UMT5EncoderModel", "T5EncoderModel"], "tokenizer": ["T5TokenizerFast", "T5Tokenizer"]}
TOKENIZER_KEYS = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "backend",
    "bos_token",
    "clean_up_tokenization_spaces",
    "eos_token",
    "extra_ids",
    "extra_special_tokens",
    "legacy",
    "model_max_length",
    "pad_token",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "tokenizer_class",
    "unk_token",
}


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a WanPipeline beside its transformer.

    Attributes:
        folders: the folders of "vae", "text_encoder" and "tokenizer"; a VAE may be one file.
        classes: library and class of the two text parts, as `text_classes` finds them.
        link: whether an export links to these folders instead of copying them.
        vae: the loaded VAE, which is written where there is no folder to copy.
    """

    folders: dict[str, Path]
    classes: dict[str, list[str]]
    link: bool
    vae: Any

    def check(self) -> None:
        """Refuse parts that a pipeline cannot hold, or that lead out of their folders, before anything is written."""
        for name, source in self.folders.items():
            if source.is_file() and (self.link or name != "vae"):
                raise UserError(
                    f"{source}: is one file, and a pipeline has the folder {name}/ of transformers and diffusers; give a copy of "
                    "that with --text_encoder_path or --vae_path, or export as original"
                )
            for file in _known_files(name, source):
                _check_stays(file, source)


def text_classes(encoder: Path) -> dict[str, list[str]]:
    """Return library and class of text encoder and tokenizer from the folder around them, else those of the released Wans.

    Raises:
        UserError: it names another class, which would have to be loaded by its name.
    """
    index_path = encoder.parent / "model_index.json"
    index = read_json(index_path) if index_path.is_file() else {}
    found = {}
    for name, allowed in CLASSES.items():
        found[name] = index.get(name) or ["transformers", allowed[0]]
        if found[name] not in [["transformers", known] for known in allowed]:
            raise UserError(
                f"{index_path}: {name} is {shown(index[name])}; allowed: a {' or '.join(allowed)} of transformers"
            )
    return found


def write_pipeline_parts(
    config: StudentConfig, folder: Path, options: SamplingOptions, parts: PipelineParts, dtype: str = "fp32"
) -> None:
    """Write a WanPipeline folder without its transformer, into an existing folder.

    Args:
        options: how the student draws; the scheduler is that of `wandistiller.sampling.sampler`. A WanPipeline takes no noise
            levels, so "flow_euler" becomes Euler's method at the pipeline's own: 0.001 off for 4 steps at shift 5, 0.002 for 8.
        dtype: precision of the transformer. With fp32 a copied text encoder is marked to be loaded in float32 too:
            transformers takes the precision that its config names, and bf16 would change the pictures.
    """
    for name, source in parts.folders.items():
        if parts.link:
            (folder / name).symlink_to(source.resolve(), target_is_directory=True)
        elif source.is_file():
            parts.vae.save_pretrained(folder / name)
        else:
            _copy(name, source, folder / name, load_as_float32=dtype == "fp32")
    sampler = "euler" if options.sampler == "flow_euler" else options.sampler
    scheduler = wan_scheduler(options.shift, options.num_inference_steps, sampler)
    # UniPC calls the shift flow_shift and FlowMatchEulerDiscreteScheduler calls it shift, so that from_config would drop it:
    scheduler.register_to_config(shift=options.shift)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        **parts.classes,
    }
    write_json(folder / "model_index.json", dict(sorted(index.items())), end="\n", indent=2)
    write_json(folder / "teacher_record.json", teacher_record(config), end="\n", indent=2)


def _known_files(part: str, folder: Path) -> list[Path]:
    """Files of a part by their names; a pipe or a link that leads nowhere is none."""
    if folder.is_file():
        return []
    return sorted(file for file in folder.iterdir() if FILES[part].fullmatch(file.name) and file.is_file())


def _check_stays(file: Path, folder: Path) -> None:
    """Refuse a link out of its folder: what it leads to would be published. The hub's cache keeps its files in blobs/."""
    root, target = folder.resolve(), file.resolve()
    blobs = [parent / "blobs" for parent in root.parents if parent.name.startswith("models--")]
    if not any(target.is_relative_to(place) for place in (root, *blobs)):
        raise UserError(
            f"{file}: is a link out of its folder, to {target}, and is not copied; put the file there, or give --link"
        )


def _copy(part: str, source: Path, target: Path, load_as_float32: bool) -> None:
    target.mkdir()
    for file in _known_files(part, source):
        if file.name in ("config.json", "tokenizer_config.json"):
            values = {key: value for key, value in read_json(file).items() if key in _known_keys(part)}
            if part == "text_encoder" and load_as_float32:
                values.pop("torch_dtype", None)  # transformers before 5 has this key
                values["dtype"] = "float32"
            write_json(target / file.name, values, end="\n", indent=2)
        else:
            shutil.copyfile(file, target / file.name)


def _known_keys(part: str) -> set[str]:
    """Keys of a part's settings: what the class of its library takes, and what it writes of itself."""
    if part == "tokenizer":
        return TOKENIZER_KEYS
    if part == "vae":
        from diffusers import AutoencoderKLWan

        return {"_class_name", "_diffusers_version", *inspect.signature(AutoencoderKLWan).parameters}
    from transformers import UMT5Config

    derived = {"model_type", "torch_dtype", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "tokenizer_class"}
    return derived | set(inspect.signature(UMT5Config).parameters)
