"""Ready student configs for the released teachers, and what each key of one does.

Standard library only: `train_distillation.py --print_config` answers at once.
"""

import sys
from pathlib import Path

from wandistiller.files.clone import CONFIG_FOLDER
from wandistiller.model.config import StudentConfig

# Each teacher's name leads to a config that fits it.
READY_CONFIGS = {
    "1.3B": "student_config_0.5B.json",
    "14B": "student_config.json",
    "A14B": "student_config.json",
    "5B": "student_config_5B.json",
    "demo": "demo_student_config.json",
}
TEACHERS = {
    "1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "A14B": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "5B": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "demo": "data/demo_teacher",
}
KEYS = {
    "model_type": 'always `"WanLiteStudent"`',
    "block": '`"wan"`: Wan\'s own block in 2D; `"lite"`: a small plain transformer without patches',
    "hidden_size": "width; a `wan` student keeps the teacher's `hidden_size / num_heads` (128 in the released models)",
    "depth": "blocks; those of the teacher that are kept are spread evenly, or chosen with `--layers`",
    "num_heads": "attention heads; for a narrower `wan` student cut these, and `hidden_size` with them",
    "ffn_dim": "neurons of each block's FFN (`lite`: always 4 x `hidden_size`)",
    "num_channels": "latent channels: the teacher's (16, or 48 for TI2V-5B)",
    "image_size": "pixels, a multiple of VAE factor x `patch_size` (16, or 32 for TI2V-5B); `--image_sizes` gives other sizes of about as many "
    "pixels",
    "patch_size": "latent pixels a token covers; the teacher's 2 (`lite`: 1)",
    "text_max_length": "text slots; 512 for the released models",
    "text_encoder_output_dim": "width of the text embeddings; 4096 for the released models",
    "freq_dim": "width of the sinusoidal time embedding; the teacher's 256 (`lite`: `hidden_size`)",
    "eps": "of the norms; the teacher's 1e-6",
}
# Each parameter has its weight, its gradient and AdamW's two moments, in float32.
BYTES_PER_PARAMETER = 16
FP32_BYTES = 4


def print_config(teacher: str) -> None:
    """Print the config on stdout, so that it can be sent to a file; its size and its keys go to stderr."""
    file = CONFIG_FOLDER / READY_CONFIGS[teacher]
    config = StudentConfig.load(file)
    print(config.to_json(), end="")
    print("\n".join(explanation(teacher, config, file)), file=sys.stderr)


def explanation(teacher: str, config: StudentConfig, file: Path) -> list[str]:
    """Return lines on how large a student is, and one for each key."""
    count, width = config.num_parameters, max(map(len, KEYS))
    return [
        f"A student for {teacher} (config/{file.name}): {count:,} parameters, {gib(FP32_BYTES * count)} of weights;",
        f"training takes {gib(BYTES_PER_PARAMETER * count)} for weights, gradients and AdamW ({BYTES_PER_PARAMETER} bytes a "
        f"parameter), {gib(FP32_BYTES * count)} more for --ema_decay, and teacher and activations besides",
        f"Your own run: python train_distillation.py --dry_run --teacher_path {TEACHERS[teacher]} --student_config "
        f"config/{file.name}",
        *(f"  {key:<{width}}  {text.replace('`', '')}" for key, text in KEYS.items()),
    ]


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.0f} MiB"
