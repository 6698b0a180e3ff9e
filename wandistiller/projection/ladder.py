"""The size ladder: students of one parameter budget in several shapes, and how far each is from the teacher before training."""

import math
from dataclasses import dataclass

from wandistiller.model.config import ConfigError, StudentConfig
from wandistiller.projection.calibrated import Calibration, calibrated_student
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.wan_files import WanFiles

BUDGET_TOLERANCE = 0.03  # relative to the parameters that were asked for
NARROWEST_FFN, WIDEST_FFN = 1.0, 4.5  # neurons for each channel of the residual stream


@dataclass(frozen=True)
class Rung:
    """A shape and its relative velocity errors before training."""

    config: StudentConfig
    norm: float
    selected: float
    refitted: float


def shapes_of_budget(teacher: StudentConfig, config: StudentConfig, count: int) -> list[StudentConfig]:
    """Return at most `count` shapes with about as many parameters as `config`, that shape first, the others by depth.

    Width, depth and FFN are those that a student of this teacher can have. Of the widths for a depth the one is taken whose
    FFN is nearest to the teacher's in proportion.
    """
    budget, ratio = config.num_parameters, teacher.ffn_dim / teacher.hidden_size
    by_depth: dict[int, list[tuple[float, StudentConfig]]] = {}
    for depth in range(1, teacher.depth + 1):
        for heads in range(1, teacher.num_heads + 1):
            shape = _filled(teacher, config, depth, heads, budget)
            if shape is not None and (depth, heads) != (config.depth, config.num_heads):
                distance = abs(math.log(shape.ffn_dim / shape.hidden_size / ratio))
                by_depth.setdefault(depth, []).append((distance, shape))
    shapes = [min(choices, key=lambda choice: choice[0])[1] for choices in by_depth.values()]
    wanted = count - 1
    if len(shapes) > wanted:  # those nearest to the asked depth, deeper and shallower alike
        shapes.sort(key=lambda shape: abs(math.log(shape.depth / config.depth)))
        shapes = sorted(shapes[:wanted], key=lambda shape: shape.depth)
    return [config, *shapes]


def _filled(teacher: StudentConfig, config: StudentConfig, depth: int, heads: int, budget: int) -> StudentConfig | None:
    """Return the shape of this depth and width whose FFN takes what is left of the budget; None if there is none."""
    width = heads * teacher.head_dim
    unit = 128 if width >= 1024 else 16
    shape = {"depth": depth, "hidden_size": width, "num_heads": heads}
    try:
        least, more = (config.replace(**shape, ffn_dim=size).num_parameters for size in (unit, 2 * unit))
        ffn_dim = unit * (1 + round((budget - least) / (more - least)))
        filled = config.replace(**shape, ffn_dim=max(unit, min(ffn_dim, teacher.ffn_dim)))
    except ConfigError:
        return None
    is_in_proportion = NARROWEST_FFN <= filled.ffn_dim / width <= WIDEST_FFN
    return filled if is_in_proportion and abs(filled.num_parameters / budget - 1) <= BUDGET_TOLERANCE else None


def measure_rung(wan_files: WanFiles, teacher: Teacher, calibration: Calibration, config: StudentConfig) -> Rung:
    """Measure a student of this shape, which is not kept."""
    report = calibrated_student(wan_files, teacher, calibration, config)[1]
    errors = report.calibration["velocity_error"]
    return Rung(config, errors["norm"], errors["selected"], errors["refitted"])


def rung_line(rung: Rung | None = None) -> str:
    """Return a line of the table, or its head."""
    if rung is None:
        names = ("parameters", "hidden_size", "depth", "num_heads", "ffn_dim", "weight norm", "energy", "refitted")
        return " ".join(f"{name:>11}" for name in names)
    config = rung.config
    sizes = (f"{config.num_parameters:,}", config.hidden_size, config.depth, config.num_heads, config.ffn_dim)
    errors = (f"{error:.3f}" for error in (rung.norm, rung.selected, rung.refitted))
    return " ".join(f"{value:>11}" for value in (*sizes, *errors))
