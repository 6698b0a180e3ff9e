"""Every ready config fits its released teacher and is counted rightly."""

import pytest
import torch

from support.runs import IDENTITY_CONFIG, ROOT
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.selection import check_fits

# The released models' own shapes (Wan2.1, Wan2.2: wan/configs/*.py)
RELEASED = {
    "1.3B": {"hidden_size": 1536, "depth": 30, "num_heads": 12, "ffn_dim": 8960},
    "14B": {"hidden_size": 5120, "depth": 40, "num_heads": 40, "ffn_dim": 13824},
    "A14B": {"hidden_size": 5120, "depth": 40, "num_heads": 40, "ffn_dim": 13824},
    "5B": {"hidden_size": 3072, "depth": 30, "num_heads": 24, "ffn_dim": 14336, "num_channels": 48, "image_size": 704},
}
CONFIGS = {path.name: path for path in sorted((ROOT / "config").glob("*student_config*.json"))}
WAN_16 = ("1.3B", "14B", "A14B")
FITS = {
    "student_config.json": WAN_16,
    "student_config_0.5B.json": WAN_16,
    "student_config_5B.json": ("5B",),
    "student_config_lite.json": (),  # for latents of 4 channels, which no released Wan has
    "demo_student_config.json": (),
}


def released(name: str) -> StudentConfig:
    return StudentConfig.from_dict(
        IDENTITY_CONFIG | {"image_size": 512, "text_encoder_output_dim": 4096} | RELEASED[name]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_fits_its_teachers_is_counted_rightly_and_is_written_as_we_write_them(name):
    config = StudentConfig.load(CONFIGS[name])
    with torch.device("meta"):
        student = WanLiteStudent(config)
    assert count_parameters(config).total == sum(parameter.numel() for parameter in student.parameters())
    for teacher in FITS[name]:
        check_fits(released(teacher), config)
        assert config.head_dim == 128 and config.ffn_dim % 128 == 0
    assert CONFIGS[name].read_text(encoding="utf-8") == config.to_json()
