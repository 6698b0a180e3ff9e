"""Latents to pictures: the teacher's VAE, PNG files that say how they were made, labelled grids.

A picture is a uint8 array (H, W, 3). Pillow and diffusers are imported where they are used.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.atomic import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

SLUG_LENGTH = 48
MIN_CELL, MAX_CELL = 160, 512  # pixels: room for a caption, and an end to the size of a grid
MARGIN, FONT_SIZE = 8, 13
MAX_CAPTION_LINES = 8

# ---- the VAE ----


def find_vae(vae_path: str | None, teacher_path: str) -> tuple[str, str | None]:
    """Where the VAE is: (folder or hub id, subfolder); `vae_path` goes before the teacher's own vae/ folder."""
    advice = (
        "give --vae_path a diffusers AutoencoderKLWan folder, such as the vae/ folder of Wan-AI/Wan2.1-T2V-1.3B-Diffusers "
        "(Wan2.1 and A14B) or of Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    )
    location = vae_path or teacher_path
    folder = Path(location)
    if (folder / "vae" / "config.json").is_file():
        return str(folder), "vae"
    if vae_path and (folder / "config.json").is_file():
        return str(folder), None
    if not folder.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", location) and location.count("/") == 1:
        return location, "vae"
    if vae_path:
        raise UserError(f"--vae_path {vae_path}: holds no VAE (no config.json there or in vae/); {advice}")
    reason = " beside it (no vae/config.json)" if folder.exists() else ": there is no such folder"
    raise UserError(f"the teacher {teacher_path} has no VAE{'' if teacher_path == 'mock' else reason}; {advice}")


def load_vae(location: str, subfolder: str | None, num_channels: int, vae_scale_factor: int, device: str = "cpu"):
    """The AutoencoderKLWan in float32, checked to be the one these latents belong to.

    Raises:
        UserError: it cannot be loaded, or has other channels or another scale factor.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    where = f"{location}/{subfolder}" if subfolder else location
    try:
        vae = AutoencoderKLWan.from_pretrained(
            location, subfolder=subfolder, dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        )
    except Exception as err:  # diffusers, huggingface_hub and safetensors each wrap a bad file in their own types
        reason = " ".join(str(err).split())[:200]
        raise UserError(f"{where}: the VAE cannot be loaded ({type(err).__name__}: {reason}); see --vae_path") from err
    factor = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    if (vae.config.z_dim, factor) != (num_channels, vae_scale_factor):
        raise UserError(
            f"{where}: is a VAE of {vae.config.z_dim} channels and factor {factor}; the student's latents have "
            f"{num_channels} channels and factor {vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    return vae.to(device).eval()


@torch.inference_mode()
def decode(
    vae, latents: Tensor, latents_mean: Sequence[float] | None, latents_std: Sequence[float] | None
) -> np.ndarray:
    """Pictures (B, H, W, 3) of latents (B, C, h, w) in model space; statistics left out are the VAE's own."""
    device = next(vae.parameters()).device
    mean = torch.tensor(latents_mean or vae.config.latents_mean, device=device)[:, None, None]
    std = torch.tensor(latents_std or vae.config.latents_std, device=device)[:, None, None]
    raw_latents = latents.to(device, torch.float32) * std + mean
    pixels = vae.decode(raw_latents[:, :, None], return_dict=False)[0][:, :, 0]  # (B, 3, H, W) in [-1, 1]
    pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
    return (pixels * 255).round().astype(np.uint8)


# ---- files ----


def slug(prompt: str) -> str:
    """A prompt as part of a file name: its letters and digits, hyphens between."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:SLUG_LENGTH].strip("-") or "prompt"


def save_png(picture: "np.ndarray | Image", path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Write a PNG, whole or not at all; `metadata` become its text entries."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, str(value))
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with atomic_path(path) as beside:
        image.save(beside, format="PNG", pnginfo=info)


# ---- grids ----


def _fitting_length(word: str, width: float, font) -> int:
    """How many letters of a word fit into `width` pixels, at least one."""
    return max(1, bisect_right(range(1, len(word) + 1), width, key=lambda length: font.getlength(word[:length])))


def wrap(text: str, width: float, font, max_lines: int = MAX_CAPTION_LINES) -> list[str]:
    """Lines of `text` no wider than `width` pixels; a word that is too wide by itself is broken.

    Text for more than `max_lines` ends in an ellipsis. The time it takes grows with the lines, not with the text.
    """
    max_chars = max(1, int(width))  # of a line: letters are more than a pixel wide

    def fits(line: str) -> bool:
        return len(line) <= max_chars and font.getlength(line) <= width

    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
            continue
        while word and len(lines) <= max_lines:
            length = _fitting_length(word[:max_chars], width, font)
            lines.append(word[:length])
            word = word[length:]
        if len(lines) > max_lines:
            lines = lines[:max_lines]
            while lines[-1] and not fits(f"{lines[-1]}..."):
                lines[-1] = lines[-1][:-1]
            lines[-1] += "..."
            break
    return lines


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) a picture is shown at: whole multiples up to MIN_CELL, shrunk past MAX_CELL."""
    if width < MIN_CELL:
        factor = -(-MIN_CELL // width)
        return height * factor, width * factor
    scale = min(1.0, MAX_CELL / max(height, width))
    return round(height * scale), round(width * scale)


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], row_names: Sequence[str] = ()
) -> "Image":
    """Rows of pictures of one size, a wrapped caption above each (may be empty), and names to the left of the rows."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=FONT_SIZE)
    line_height = sum(font.getmetrics()) + 1
    cell_height, cell_width = _cell_size(*rows[0][0].shape[:2])
    wrapped = [[wrap(caption, cell_width, font) for caption in row] for row in captions]
    caption_heights = [line_height * max(map(len, row), default=0) for row in wrapped]
    left = MARGIN + (round(max(map(font.getlength, row_names))) + MARGIN if row_names else 0)
    num_columns = max(map(len, rows))
    size = (
        left + num_columns * (cell_width + MARGIN),
        MARGIN + sum(height + cell_height + MARGIN for height in caption_heights),
    )
    grid = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(grid)
    top = MARGIN
    for index, row in enumerate(rows):
        top += caption_heights[index]
        if row_names:
            drawing.text((MARGIN, top + cell_height / 2), row_names[index], "black", font, anchor="lm")
        for column, (picture, lines) in enumerate(zip(row, wrapped[index], strict=True)):
            x, first_line = left + column * (cell_width + MARGIN), top - line_height * len(lines)
            for number, line in enumerate(lines):
                drawing.text((x, first_line + number * line_height), line, "black", font)
            resampling = Image.Resampling.NEAREST if cell_width > picture.shape[1] else Image.Resampling.LANCZOS
            grid.paste(Image.fromarray(picture).resize((cell_width, cell_height), resampling), (x, top))
        top += cell_height + MARGIN
    return grid
