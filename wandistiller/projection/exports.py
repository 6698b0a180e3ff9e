"""2D -> 3D: a wan student's weights as those of a Wan, in the files of other tools, which answer the same at one frame.

The patch kernel is the only weight whose shape differs: Conv2d (D, C, P, P) is the one frame of Conv3d (D, C, 1, P, P). `project.py`
goes from 3D to 2D. Each file carries the student's own config in its metadata, so that `wandistiller.wan.layouts` opens it as a
teacher. The GGUF was held against city96/ComfyUI-GGUF of December 2025: loader.py (gguf_sd_loader), ops.py (GGMLOps),
tools/convert.py (ModelWan) and tools/lcpp.patch.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller import __version__
from wandistiller.errors import UserError
from wandistiller.files.atomic import write_json
from wandistiller.files.clone import DEMO_TEACHER, DEMO_WORLD
from wandistiller.files.gguf_files import block_size, write_gguf
from wandistiller.files.tensor_files import write_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import FP8, FP8_MAX
from wandistiller.model.transformer import FP32_ISLANDS
from wandistiller.projection.comfyui import comfyui_metadata, needs_metadata
from wandistiller.sampling.flow import NUM_TRAIN_TIMESTEPS
from wandistiller.sampling.sampler import wan_scheduler
from wandistiller.students.record import StudentRecord
from wandistiller.wan.names import PATCH_KERNEL, teacher_record, to_original, transformer_settings
from wandistiller.wan.text_encoder_files import TextEncoderFiles, open_tokenizer, write_tokenizer
from wandistiller.wan.transformer_files import GGUF_ARCHITECTURE
from wandistiller.wan.umt5 import COPY, MAP, config_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}
# The gguf library quantises to these; the types of K are llama.cpp's alone to write.
GGUF_TYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0"}
# Quantised files keep these weights in few bits, plain fp8 ones without a scale: the matrices of the blocks.
LINEAR_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_|ffn\.net\.).*\.weight")
TEXT_LAYER = "condition_embedder.text_embedder.linear_1.weight"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


# ---- the transformer ----


def lift(tensors: dict[str, Tensor], dtype: str = "fp32") -> dict[str, Tensor]:
    """Return a wan student's weights as those of a 3D Wan transformer, by canonical name.

    Args:
        tensors: the student's state dict.
        dtype: "fp32", "bf16", "fp16" or "fp8"; norms, modulation and time embedding stay float32. fp8 means float8_e4m3fn
            without scales for the Linear weights of the blocks, and bf16 for the rest.
    """
    return {name: _in_dtype(name, _with_one_frame(name, tensor), dtype) for name, tensor in tensors.items()}


def _with_one_frame(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, None] if name == PATCH_KERNEL else tensor


def _in_dtype(name: str, tensor: Tensor, dtype: str) -> Tensor:
    if FP32_ISLANDS.search(name):
        return tensor.float().contiguous()
    if dtype == "fp8":
        if LINEAR_OF_A_BLOCK.fullmatch(name):
            return tensor.clamp(-FP8_MAX, FP8_MAX).to(FP8).contiguous()  # older torch turns larger values into nan
        dtype = "bf16"
    return tensor.to(DTYPES[dtype]).contiguous()


def write_original_file(tensors: dict[str, Tensor], config: StudentConfig, path: Path, dtype: str = "fp32") -> None:
    """Write one safetensors file of original Wan names, whole or not at all; `tensors` is the student's state dict."""
    lifted = {to_original(name): tensor for name, tensor in lift(tensors, dtype).items()}
    write_tensors(path, lifted, _about(config) | comfyui_metadata(config))


def write_transformer_folder(
    tensors: dict[str, Tensor], config: StudentConfig, folder: Path, dtype: str = "fp32"
) -> None:
    """Write config.json and weights of a diffusers WanTransformer3DModel into an existing folder."""
    write_json(folder / "config.json", transformer_settings(config), indent=2)
    write_tensors(folder / WEIGHTS_NAME, lift(tensors, dtype), _about(config))


def write_gguf_file(tensors: dict[str, Tensor], config: StudentConfig, path: Path, dtype: str = "fp32") -> None:
    """Write one GGUF file of original Wan names, whole or not at all.

    Args:
        tensors: the student's state dict.
        dtype: a key of `GGUF_TYPES`. Norms, modulation, time embedding, biases and the patch kernel stay F32, which ComfyUI-GGUF
            needs of all that is no Linear weight; of a quantised file only the matrices of the blocks are, and others are F16.
    """
    stored = {
        to_original(name): (_with_one_frame(name, tensor), _gguf_type(name, tensor, GGUF_TYPES[dtype], path))
        for name, tensor in tensors.items()
    }
    write_gguf(path, GGUF_ARCHITECTURE, stored, {"student_config": config.to_json(), **comfyui_metadata(config)})


def _gguf_type(name: str, tensor: Tensor, dtype: str, path: Path) -> str:
    if tensor.ndim == 1 or name == PATCH_KERNEL or FP32_ISLANDS.search(name):
        return "F32"
    block = block_size(path, dtype)
    fits = block == 1 or (LINEAR_OF_A_BLOCK.fullmatch(name) and tensor.shape[-1] % block == 0)
    return dtype if fits else "F16"


def refuse_what_gguf_drops(config: StudentConfig) -> None:
    """Refuse a student that ComfyUI would misread from a GGUF, since its loader passes no metadata on.

    The number of heads is the trap: it is in no tensor, and a wrong one draws without an error.
    """
    if lost := needs_metadata(config):
        raise UserError(
            f"--format gguf: this student has {lost[0]}. No tensor of a GGUF tells that, and ComfyUI would draw wrongly without a "
            "word; give --format original, whose metadata it reads"
        )


def published(config: StudentConfig) -> StudentConfig:
    """Return the config of an export: without commands and paths of this machine, and with the demo's world."""
    if not (record := config.distillation):
        return config
    private = ("command", "commands", "extra_prompts", "init_from")
    kept = {name: value for name, value in record.items() if "_path" not in name and name not in private}
    if record.get("base_model"):  # the hub's repository of the teacher, where the run took it from there
        kept["teacher_path"] = record["base_model"]
    if record.get("teacher_path") == f"./{DEMO_TEACHER}":
        kept |= {"world": DEMO_WORLD}
    if loras := record.get("teacher_loras"):
        kept["teacher_loras"] = [{name: lora[name] for name in lora if name != "path"} for lora in loras]
    return config.replace(distillation=kept)


def _about(config: StudentConfig) -> dict[str, str]:
    return {"format": "pt", "student_config": config.to_json(), "wandistiller_version": __version__}


# ---- the rest of a pipeline ----


def write_pipeline_parts(
    config: StudentConfig, folder: Path, encoder: TextEncoderFiles, vae: Any, dtype: str = "fp32"
) -> None:
    """Write a WanPipeline folder without its transformer, into an existing folder.

    VAE and text encoder are written from the tensors that were read, and nothing of their folders is copied: those may be a
    stranger's.

    Args:
        vae: diffusers' AutoencoderKLWan.
        dtype: precision of the transformer.
    """
    vae.save_config(folder / "vae")
    write_tensors(folder / "vae" / WEIGHTS_NAME, vae.state_dict(), {"format": "pt"})
    _write_text_encoder(encoder, folder, dtype)
    scheduler = pipeline_scheduler(StudentRecord.of(config))
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(folder / "model_index.json", index, indent=2)
    write_json(folder / "teacher_record.json", teacher_record(config), indent=2)


def pipeline_scheduler(record: StudentRecord):
    """Return a scheduler of diffusers that a WanPipeline, which sets nothing but the number of steps, draws with as we do.

    FlowMatchEulerDiscreteScheduler spreads n levels evenly from 1 down to sigma_min, shifts them, and stretches them to end in
    shift_terminal. Ours are even from 1 down to 1/n and then shifted. Both are the same Moebius map of the step's number where
    shift_terminal is our last level, and 1 - 1/shift' = k / (1 - sigma_min) with k = (1 - 1/n) (1 - 1/shift).

    Raises:
        UserError: no shift' does that, as for 50 steps at shift 30.
    """
    shift, steps = record.shift, record.steps
    if record.sampler == "renoise":
        raise UserError(
            "--format pipeline: a WanPipeline does not set noise levels as this student has them; give --format diffusers, and draw with "
            f"FlowMatchLCMScheduler(shift=1) at 1000 sigma of {', '.join(f'{level:g}' for level in record.teacher_levels or ())}"
        )
    assert shift is not None and steps is not None  # a student that draws records them
    scheduler = wan_scheduler(shift, steps, record.sampler)
    if record.sampler == "euler":
        k, low = (1 - 1 / steps) * (1 - 1 / shift), 1 / NUM_TRAIN_TIMESTEPS  # of which sigma_min is the shifted one
        b = (1 - k) * (1 - low)
        root = math.sqrt(max(0.0, b * b - 4 * k * low * (1 - low)))
        last = float(scheduler.sigmas[-2]) if steps > 1 else None
        own = type(scheduler)(NUM_TRAIN_TIMESTEPS, shift=2 * (1 - low) / (b + root), shift_terminal=last)
        own.set_timesteps(steps)
        if not torch.allclose(own.sigmas, scheduler.sigmas, atol=1e-4):
            raise UserError(f"--format pipeline: diffusers has no scheduler for {steps} steps at shift {shift:g}")
        scheduler = own
    # UniPC calls the shift flow_shift and FlowMatchEulerDiscreteScheduler calls it shift, and from_config drops the other's name:
    name = "flow_shift" if record.sampler == "euler" else "shift"
    scheduler.register_to_config(**{name: shift})
    return scheduler


def fold_embedding_map(
    tensors: dict[str, Tensor], config: StudentConfig, embedding_map: Tensor
) -> tuple[dict[str, Tensor], StudentConfig]:
    """Return a student that reads the hidden states of a small text encoder as it reads what their map (text_dim, d) makes of them."""
    folded = tensors[TEXT_LAYER].float() @ embedding_map
    return tensors | {TEXT_LAYER: folded}, config.replace(text_encoder_output_dim=folded.shape[1])


def _write_text_encoder(files: "TextEncoderFiles", folder: Path, dtype: str) -> None:
    """Write text_encoder/ and tokenizer/.

    The encoder is stored in bf16 where nothing is lost by that, or other than fp32 is asked for. transformers loads it in the
    precision that its config names, and bf16 there would change the pictures of an fp32 export.
    """
    is_half = dtype != "fp32" or files.umt5.is_bfloat16
    encoder = files.umt5.load(torch.bfloat16 if is_half else torch.float32)
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if name not in (COPY, MAP)}
    config = config_of(files.umt5.shape, "float32" if dtype == "fp32" else "bfloat16")
    (folder / "text_encoder").mkdir()
    write_json(folder / "text_encoder" / "config.json", config, indent=2)
    write_tensors(folder / "text_encoder" / "model.safetensors", weights, {"format": "pt"})

    open_tokenizer(files.tokenizer)  # refuses what is none
    (folder / "tokenizer").mkdir()
    write_tokenizer(files.tokenizer, folder / "tokenizer")
    settings = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 512}
    settings |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer" / "tokenizer_config.json", settings, indent=2)
