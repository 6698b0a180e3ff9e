"""Ready student configs for the released teachers, and what each key of one does.

Standard library only: `train_distillation.py --print_config` answers at once.
"""

import sys

from wandistiller.files.clone import CONFIG_FOLDER
from wandistiller.model.config import StudentConfig

# A ready config for each teacher
READY_CONFIGS = {
    "1.3B": "student_config_0.5B.json",
    "14B": "student_config.json",
    "A14B": "student_config.json",
    "5B": "student_config_5B.json",
    "demo": "demo_student_config.json",
}
KEYS = {
    "model_type": 'always "WanLiteStudent"',
    "block": '"wan": Wan\'s own block in 2D; "lite": a small plain transformer without patches',
    "hidden_size": "width; a wan student keeps the teacher's hidden_size / num_heads (128 in the released models)",
    "depth": "blocks; those of the teacher that are kept are spread evenly, or chosen with --layers",
    "num_heads": "attention heads; for a narrower wan student cut these, and hidden_size with them",
    "ffn_dim": "neurons of each block's FFN (lite: always 4 x hidden_size)",
    "num_channels": "latent channels: the teacher's (16, or 48 for TI2V-5B)",
    "image_size": "pixels, a multiple of VAE factor x patch_size (16, or 32 for TI2V-5B); --image_sizes gives other sizes of about as many "
    "pixels",
    "patch_size": "latent pixels a token covers; the teacher's 2 (lite: 1)",
    "text_max_length": "text slots; 512 for the released models",
    "text_encoder_output_dim": "width of the text embeddings; 4096 for the released models",
    "freq_dim": "width of the sinusoidal time embedding; the teacher's 256 (lite: hidden_size)",
    "eps": "of the norms; the teacher's 1e-6",
}


def print_config(teacher: str) -> None:
    """Print the config on stdout, so that it can be sent to a file; its size and its keys go to stderr."""
    config = StudentConfig.load(CONFIG_FOLDER / READY_CONFIGS[teacher])
    print(config.to_json(), end="")
    print(
        f"A student for {teacher} (config/{READY_CONFIGS[teacher]}): {config.num_parameters:,} parameters",
        file=sys.stderr,
    )
    for key, text in KEYS.items():
        print(f"  {key:<{max(map(len, KEYS))}}  {text}", file=sys.stderr)
