"""Calibrated projection: a student selected and refitted on what its teacher does, instead of on its weights alone.

    calibration = calibrate(teacher, embeds, settings.latent_shape(config), "high", CalibrationOptions())
    student, report = calibrated_student(wan_files, teacher, calibration, config)

The calibration does not depend on the student's shape beyond its latents: one serves students of many sizes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wandistiller.model.config import ConfigError, StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.calibration import (
    CalibrationOptions,
    CalibrationStates,
    Energies,
    draw_states,
    measure_energies,
)
from wandistiller.projection.project import ProjectionReport, project_teacher
from wandistiller.projection.repair import Repair
from wandistiller.projection.selection import select
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.wan_files import WanFiles


@dataclass(frozen=True)
class Calibration:
    """What is known of a teacher before a student's shape is: the same for every size.

    Attributes:
        expert: which expert was traced, the one that students are made of.
        embeds: text tokens of the prompts that the states belong to.
        fitted, held_back: states to fit students on, and to measure them on.
        energies: how much the expert's units do at the fitted states.
        options: how much it was calibrated on.
    """

    expert: str
    embeds: PromptEmbeds
    fitted: CalibrationStates
    held_back: CalibrationStates
    energies: Energies
    options: CalibrationOptions


@dataclass
class CalibratedReport(ProjectionReport):
    """A projection report that says how far the student is from its teacher before training.

    Attributes:
        calibration: velocity errors on states that nothing was fitted on, "norm" as selected by weight norm, "selected" as
            selected by energy, and after every stage of the refit; for blocks also how far the residual stream is off.
    """

    calibration: dict = field(default_factory=dict)

    def summary(self) -> str:
        """Return the lines of any projection, and the errors after each stage."""
        stages = self.calibration.get("stages", [])
        if not stages:
            return super().summary()
        errors = self.calibration["velocity_error"]
        lines = [super().summary(), "Relative velocity error before training, on the teacher's paths:"]
        lines.append(f"  by weight norm {errors['norm']:.3f}, by energy {errors['selected']:.3f}")
        for stage in stages:
            stream = "" if stage["residual_error"] is None else f", residual stream {stage['residual_error']:.3f}"
            lines.append(f"  refitted: {stage['name']:<10}{stage['velocity_error']:.3f}{stream}")
        return "\n".join(lines)


def calibrate(
    teacher: Teacher,
    embeds: PromptEmbeds,
    latent_shape: tuple[int, int, int],
    expert: str,
    options: CalibrationOptions,
) -> Calibration:
    """Sample the teacher and trace one of its experts.

    Args:
        teacher: with all its experts; not sharded, and with `wan` blocks.
        embeds: text tokens of the prompts to calibrate on, of which some are chosen.
        latent_shape: (C, H, W) of the student's images.
        expert: the expert that students are made of. Its hidden states are what their layers follow at every noise level;
            their head follows the guided answer of whichever expert answers.
    """
    fitted, held_back = draw_states(teacher, embeds, latent_shape, options)
    energies = measure_energies(teacher.use(expert), fitted, embeds, options)
    return Calibration(expert, embeds, fitted, held_back, energies, options)


def calibrated_student(
    wan_files: WanFiles,
    teacher: Teacher,
    calibration: Calibration,
    config: StudentConfig,
    *,
    layers: list[int] | None = None,
    refit: bool = True,
) -> tuple[WanLiteStudent, CalibratedReport]:
    """Make a student of a wan shape, in float32, whose weights are selected by energy and refitted.

    At the teacher's own shape the student is the teacher, bit for bit.

    Args:
        layers: the teacher layer of each student block, in rising order; None spreads them evenly with both ends kept.
        refit: whether layers are refitted; without it the student is a part of the teacher as it is.

    Raises:
        ConfigError: the config does not fit the teacher, or has lite blocks, whose layers no layers of the teacher answer to.
    """
    check_can_be_calibrated(config)
    expert, options = calibration.expert, calibration.options
    files = wan_files.expert(expert)
    by_norm, report = project_teacher(wan_files, config, expert, layers=layers, device=options.device)
    errors = {"norm": velocity_error(by_norm, calibration)}
    if is_own_shape(files.config, config):
        errors |= dict.fromkeys(("selected", "refitted"), errors["norm"])
        return by_norm, CalibratedReport(**vars(report), calibration={"velocity_error": errors, "stages": []})
    del by_norm
    selection = select(files, config, layers, calibration.energies.score)
    student, report = project_teacher(wan_files, config, expert, device=options.device, selection=selection)
    errors["selected"] = velocity_error(student, calibration)
    stages: list[dict] = []
    if refit:

        def after(name: str, residual_error: float | None) -> None:
            error = velocity_error(student, calibration)
            stages.append({"name": name, "velocity_error": error, "residual_error": residual_error})

        selected = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        Repair(student, teacher.use(expert), selection, calibration.fitted, calibration.embeds, options)(after)
        errors["refitted"] = stages[-1]["velocity_error"]
        _note_refitted(report, student, selected)
    about = {name: getattr(options, name) for name in ("num_paths", "num_levels", "num_texts", "ridge", "seed")}
    return student, CalibratedReport(**vars(report), calibration={"velocity_error": errors, "stages": stages, **about})


def check_can_be_calibrated(config: StudentConfig) -> None:
    """Refuse lite students."""
    if config.block != "wan":
        raise ConfigError(
            f'block="{config.block}" cannot be calibrated, its layers have no counterpart in the teacher; use --selection '
            "norm, or a student of wan blocks"
        )


def is_own_shape(teacher: StudentConfig, config: StudentConfig) -> bool:
    """Tell whether a student's shape is the whole teacher's."""
    sizes = ("block", "hidden_size", "depth", "num_heads", "ffn_dim")
    return all(getattr(teacher, name) == getattr(config, name) for name in sizes)


def _note_refitted(report: ProjectionReport, student: WanLiteStudent, selected: dict[str, Tensor]) -> None:
    """Mark in the report what is no longer the teacher's own value."""
    report.num_parameters["refitted"] = 0
    for name, parameter in student.named_parameters():
        entry = report.student[name]
        if not torch.equal(parameter, selected[name]):
            report.num_parameters[entry["status"]] -= parameter.numel()
            report.num_parameters["refitted"] += parameter.numel()
            report.student[name] = entry | {"status": "refitted", "detail": f"from {entry['detail']}"}


def velocity_error(student: WanLiteStudent, calibration: Calibration) -> float:
    """Return the mean of |student - teacher| / |teacher| over the states that are held back; the teacher is guided."""
    return states_error(student, calibration.held_back, calibration.embeds, calibration.options)


@torch.no_grad()
def states_error(
    student: WanLiteStudent, states: CalibrationStates, embeds: PromptEmbeds, options: CalibrationOptions
) -> float:
    """Return the mean of |student - teacher| / |teacher| over states."""
    errors = []
    for level, paths in states.batches(options.batch_size):
        text = embeds.batch(states.prompts[paths], options.device)
        timestep = sigma_to_timestep(states.sigma[level]).to(options.device)
        answer = student(states.latents[level, paths].to(options.device), timestep, *text).double().flatten(1)
        expected = states.velocity[level, paths].to(options.device).double().flatten(1)
        errors.append((answer - expected).norm(dim=1) / expected.norm(dim=1))
    return float(torch.cat(errors).mean())
