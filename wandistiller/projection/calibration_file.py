"""A calibration on disk: what is known of a teacher before a student's shape is, so that another size takes seconds."""

import json
from pathlib import Path

from wandistiller.errors import UserError, shown
from wandistiller.files.atomic import atomic_path
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.safetensors_files import DamagedFileError, read_header, read_tensors
from wandistiller.projection.calibrated import Calibration
from wandistiller.projection.calibration import CalibrationOptions, CalibrationStates, Energies
from wandistiller.wan.prompt_embeds import PromptEmbeds

_STATES = ("latents", "sigma", "prompts", "velocity")
_TENSORS = [f"{part}.{name}" for part in ("fitted", "held_back") for name in _STATES]
# What the states and energies depend on; the other options may change from one student to the next.
_DESCRIBED_OPTIONS = ("num_paths", "num_held_back", "num_levels", "num_texts", "seed")


def describe_calibration(about: dict, expert: str, options: CalibrationOptions) -> dict:
    """Return everything that makes a calibration what it is, as it is read back.

    Args:
        about: the teacher, its settings, the prompts and the latents' shape.
    """
    described = {name: getattr(options, name) for name in _DESCRIBED_OPTIONS}
    return json.loads(json.dumps(about | {"expert": expert} | described))


def save_calibration(path: str | Path, calibration: Calibration, about: dict) -> None:
    """Write a calibration to one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    parts = {"fitted": calibration.fitted, "held_back": calibration.held_back}
    tensors = {f"{part}.{name}": getattr(states, name) for part, states in parts.items() for name in _STATES}
    tensors |= {f"squares.{name}": values for name, values in calibration.energies.squares.items()}
    tensors["channels"] = calibration.energies.channels
    description = describe_calibration(about, calibration.expert, calibration.options)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as file:
        metadata = {"calibration": json.dumps(description)}
        # Copies: states fitted on and held back are parts of the same tensors.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata)


def load_calibration(
    path: str | Path, embeds: PromptEmbeds, about: dict, expert: str, options: CalibrationOptions
) -> Calibration:
    """Read a saved calibration.

    Raises:
        UserError: it is damaged, or of another teacher, other prompts or other options; it says what differs.
    """
    try:
        saved = parse_json(read_header(path).metadata.get("calibration", "null"))
        tensors = read_tensors(path)
    except (DamagedFileError, JsonError) as error:
        reason = error.reason if isinstance(error, DamagedFileError) else error
        raise UserError(f"{path}: is not a whole calibration ({reason}); remove it, it is made again") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path}: is no calibration; give --calibration_cache another name")
    wanted = describe_calibration(about, expert, options)
    for name in wanted | saved:
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: is a calibration with {name} {shown(saved.get(name))}, this one has {shown(wanted.get(name))}; give "
                "--calibration_cache another name"
            )
    lacking = [name for name in (*_TENSORS, "channels") if name not in tensors]
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if lacking or broken:
        what = f"lacks {lacking[0]}" if lacking else f"{broken[0]} is not finite"
        raise UserError(f"{path}: is not a whole calibration ({what}); remove it, it is made again")
    fitted, held_back = (
        CalibrationStates(*(tensors[f"{part}.{name}"] for name in _STATES)) for part in ("fitted", "held_back")
    )
    squares = {name.removeprefix("squares."): values for name, values in tensors.items() if name.startswith("squares.")}
    return Calibration(expert, embeds, fitted, held_back, Energies(tensors["channels"], squares), options)
