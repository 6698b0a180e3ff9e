"""How a teacher is sampled: each released Wan as it was made for, others as their folder or a person says."""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from wandistiller.errors import UserError
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize, square
from wandistiller.wan.lora import Lora
from wandistiller.wan.names import side_of
from wandistiller.wan.transformer_files import WanTransformer
from wandistiller.wan.vae import RELEASED_LATENTS
from wandistiller.wan.wan_files import WanFiles

# This is Wan's own (Wan2.2:wan/configs/shared_config.py) without its words for still, static, picture and artwork, which
# push away from stills.
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，细节模糊不清，字幕，风格，作品，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，杂乱的背景，三条腿，背景人很多，倒着走"
)
RELEASED_TEXT_MAX_LENGTH = 512

_COMMON = {"shift": 5.0, "num_inference_steps": 50, "guidance_scale": 5.0}
_TWO = {
    "shift": 12.0,
    "num_inference_steps": 40,
    "boundary_ratio": 0.875,
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
}
# Of each released Wan (width, latent channels, experts), and how it was made to be sampled (Wan2.1, Wan2.2: wan/configs/*.py,
# generate.py). The guidance of two experts is the high-noise one's, and then the low-noise one's.
RELEASED: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "Wan2.1-T2V-1.3B": ((1536, 16, 1), _COMMON),
    "Wan2.1-T2V-14B": ((5120, 16, 1), _COMMON),
    "Wan2.2-T2V-A14B": ((5120, 16, 2), _TWO),
    "Wan2.2-TI2V-5B": ((3072, 48, 1), _COMMON),
}
_USUAL = _COMMON | {"boundary_ratio": 0.875}  # of any other Wan
# FastVideo's FastWan: its class in the index of diffusers, and the levels that it was distilled to (FastVideo: configs/pipelines/wan.py)
FASTWAN_PIPELINE = "WanDMDPipeline"
FASTWAN = {"teacher_sampler": "renoise", "teacher_levels": (1000.0, 757.0, 522.0), "shift": 8.0, "guidance_scale": 1.0}


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher is sampled, and so what the student learns; saved in the student's config.

    Attributes:
        preset: name of the released model that these values come from, or words for their other source.
        guidance_scale: g of v_uncond + g (v_cond - v_uncond) for the only expert, or for the high-noise one of two.
        guidance_scale_2: g for the low-noise expert; None with one expert.
        boundary_ratio: sigma at and above which the high-noise expert answers; None with one expert.
        latents_mean, latents_std: statistics that make model space (z - mean) / std; None where unknown.
        teacher_sampler: "unipc", for a teacher of all noise levels; "euler", for one that was distilled to `num_inference_steps` and
            knows the noise levels of these alone; or "renoise", for one of `teacher_levels`, which noises its x_0 anew at each.
        teacher_levels: 1000 sigma, from 1000 down; () but for "renoise".
    """

    preset: str
    shift: float
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    boundary_ratio: float | None
    negative_prompt: str
    latents_mean: list[float] | None
    latents_std: list[float] | None
    vae_scale_factor: int
    teacher_sampler: str = "unipc"
    teacher_levels: tuple[float, ...] = ()

    def recorded(self) -> dict[str, object]:
        """Return the entries of a student's record; values at their default are left out."""
        usual = {known.name: known.default for known in fields(self) if known.default is not MISSING}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    def latent_shape(self, student: StudentConfig, size: ImageSize | None = None) -> tuple[int, int, int]:
        """Return (C, H, W) of images of a size, or of the student's square ones, behind the teacher's VAE."""
        width, height = size or square(student.image_size)
        return student.num_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    @property
    def is_released(self) -> bool:
        return self.preset in RELEASED

    def summary(self) -> str:
        line = f"settings from {self.preset}: shift {self.shift:g}, guidance_scale {self.guidance_scale:g}"
        if self.boundary_ratio is not None:
            line += f", guidance_scale_2 {self.guidance_scale_2:g}, boundary_ratio {self.boundary_ratio:g}"
        return line

    @property
    def has_few_levels(self) -> bool:
        """Whether the teacher knows the noise levels of its own sampler alone."""
        return self.teacher_sampler != "unipc"

    @property
    def uses_guidance(self) -> bool:
        return any(scale not in (None, 1.0) for scale in (self.guidance_scale, self.guidance_scale_2))


def resolve_settings(wan_files: WanFiles, **given: Any) -> TeacherSettings:
    """Return the settings that the flags give, else a released model's preset, else what the folder records.

    An exported student says itself how it is sampled. For the others the preset goes before the folder because converted
    folders carry another shift (3 where A14B was made for 12: diffusers issue 12094). A single --guidance_scale counts for
    both experts, as in diffusers.

    Args:
        given: shift, guidance_scale, guidance_scale_2, boundary_ratio, negative_prompt, teacher_steps, teacher_sampler and
            teacher_levels; what is left out or None is the teacher's own.
    """
    has_two = "low" in wan_files.experts
    typed = {name: value for name, value in given.items() if value is not None}
    if not has_two and "guidance_scale_2" in typed:
        raise UserError(
            "--guidance_scale_2 is the low-noise expert's; this teacher has one expert, use --guidance_scale"
        )
    if not has_two and "boundary_ratio" in typed:
        raise UserError("--boundary_ratio divides two experts; this teacher has one, leave the flag out")
    preset, base = _sampled_as(wan_files)
    if "guidance_scale" in typed:
        base["guidance_scale_2"] = typed["guidance_scale"]
    if "teacher_steps" in typed:
        base["num_inference_steps"] = typed["teacher_steps"]
    values = {"negative_prompt": DEFAULT_NEGATIVE_PROMPT, "teacher_sampler": "unipc"} | base | typed
    levels = tuple(values["teacher_levels"]) if values["teacher_sampler"] == "renoise" else ()
    record = wan_files.record
    latents = record.get("latents_mean"), record.get("latents_std")
    if not all(latents):
        latents = RELEASED_LATENTS.get(wan_files.config.num_channels, (None, None))
    return TeacherSettings(
        preset=preset,
        shift=values["shift"],
        num_inference_steps=len(levels) or values["num_inference_steps"],
        guidance_scale=values["guidance_scale"],
        guidance_scale_2=values.get("guidance_scale_2", values["guidance_scale"]) if has_two else None,
        boundary_ratio=values["boundary_ratio"] if has_two else None,
        negative_prompt=values["negative_prompt"],
        latents_mean=latents[0],
        latents_std=latents[1],
        vae_scale_factor=record.get("vae_scale_factor") or wan_files.config.vae_scale_factor,
        teacher_sampler=values["teacher_sampler"],
        teacher_levels=levels,
    )


def _sampled_as(wan_files: WanFiles) -> tuple[str, dict[str, Any]]:
    """Return the name and the values of the released model of this structure, or those of the folder or record of another teacher.

    A student may well have the width of a released model, and must not be guided as one.
    """
    config, record = wan_files.config, wan_files.record
    if wan_files.pipeline == FASTWAN_PIPELINE and "guidance_scale" not in record:
        return "FastWan", _USUAL | FASTWAN
    structure = config.hidden_size, config.num_channels, len(wan_files.experts)
    for name, (released, values) in RELEASED.items() if "guidance_scale" not in record else ():
        if released == structure:
            return name, _USUAL | record | values
    return "the checkpoint's own record" if "shift" in record else "Wan's usual values", _USUAL | record


def describe_teacher(wan_files: WanFiles, settings: TeacherSettings) -> dict[str, object]:
    """Return the identity of a teacher's velocities: its weights, guidance and sampling.

    LoRAs stand beside the fingerprint of the weights on disk, into which they are merged as these are read. Unusual ways to sample
    are there only where they are used.
    """
    of_latents = ("preset", "latents_mean", "latents_std", "vae_scale_factor")
    sampled = {name: value for name, value in settings.recorded().items() if name not in of_latents}
    if not settings.uses_guidance:
        sampled["negative_prompt"] = None
    loras = {"teacher_lora": [lora.identity for lora in wan_files.loras]} if wan_files.loras else {}
    return {"teacher": wan_files.fingerprint(), **sampled, **loras}


def warnings_about(wan_files: WanFiles, settings: TeacherSettings, student: StudentConfig) -> list[str]:
    """Return a sentence for each thing that is allowed and yet probably not meant."""
    warnings = []
    teacher, own = wan_files.config, wan_files.experts["high"].student
    slots = own.text_max_length if own else RELEASED_TEXT_MAX_LENGTH if settings.is_released else None
    if slots not in (None, student.text_max_length):
        warnings.append(
            f"text_max_length={student.text_max_length}; {'this teacher was' if own else 'the released Wans were'} trained with {slots} "
            "text slots, and another number gives other answers"
        )
    if (levels := tuple(wan_files.record.get("sigma_range") or ())) not in ((), (0, 1)):
        warnings.append(f"this teacher was trained at sigma {levels[0]:g} to {levels[1]:g} alone, and is asked at all")
    is_known = teacher.hidden_size in {structure[0] for structure, _ in RELEASED.values()}
    if wan_files.experts["high"].heads_are_assumed and not is_known:
        warnings.append(
            f"{wan_files.location}: no config.json tells its number of heads; {teacher.num_heads} of {teacher.head_dim} "
            "channels are assumed, the released Wans' width; if that is wrong, give the folder with its config.json"
        )
    if settings.has_few_levels and settings.is_released and settings.uses_guidance:
        warnings.append(
            f"a teacher of {settings.num_inference_steps} steps with guidance_scale {settings.guidance_scale:g}; those distilled to "
            "few steps mostly are to guidance too, and want --guidance_scale 1"
        )
    if wan_files.pipeline not in (None, "None", "WanPipeline", "WanModularPipeline", FASTWAN_PIPELINE) and (
        "guidance_scale" not in wan_files.record
    ):
        warnings.append(
            f"{wan_files.location}: is a {wan_files.pipeline}, asked here as a Wan of its size; say how it was made to be sampled with "
            "--shift, --guidance_scale, --teacher_steps, --teacher_sampler and --teacher_levels"
        )
    return warnings + _expert_warnings(wan_files, settings)


def _expert_warnings(wan_files: WanFiles, settings: TeacherSettings) -> list[str]:
    """Return warnings by the names and titles of files: experts or LoRAs the wrong way round, and one expert alone.

    The weights tell nothing of it: both experts have one structure, and no known number of either sets them apart.
    """
    if len(wan_files.experts) == 1:
        if not any(_sides_of(wan_files.experts["high"])):
            return []
        return [
            f"{wan_files.location} looks like one of two experts and is used at every noise level, with "
            f"{settings.summary()}; give the folder of both, or the low-noise one as --teacher_path_low"
        ]
    other = {"high": "low", "low": "high"}
    files: list[tuple[str, Any, str, str]] = [
        (side, expert, "expert", "--teacher_path") for side, expert in wan_files.experts.items()
    ]
    files += [(lora.expert, lora, "LoRA", "--teacher_lora") for lora in wan_files.loras]
    return [
        f"{_place_of(file)} looks like the {other[side]}-noise {kind} and is used as the {side}-noise one: the two experts seem to be "
        f"swapped; exchange {flag} and {flag}_low"
        for side, file, kind, flag in files
        if other[side] in _sides_of(file)
    ]


def _place_of(file: WanTransformer | Lora) -> str:
    return str(file.path if isinstance(file, Lora) else file.location)


def _sides_of(file: WanTransformer | Lora) -> list[str | None]:
    return [side_of(_place_of(file)), side_of(file.title)]
