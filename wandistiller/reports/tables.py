"""An evaluation as a table for the screen, and as values that JSON can hold."""

import math
import textwrap
from collections.abc import Callable


def cell_text(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def table_lines(results: dict) -> list[str]:
    """The results as a table for the screen."""

    def line(name: str, *cells: str | float | None) -> str:
        return f"{name:<42}" + "".join(f"{cell_text(cell):>16}" for cell in cells)

    def compared(name: str, row: dict) -> str:
        return line(name, row["student"], row["teacher"], row["ratio"])

    endpoint, fewer = results["endpoint"], results["teacher_at_fewer_steps"]
    lines = [line("", "student", "teacher", "ratio")]
    if "accuracy" in results:
        judged = results["accuracy"]
        both = judged["student"], judged["teacher"]
        lines += [
            line(f"prompt accuracy ({judged['num_pictures']} pictures)", *(b["correct"] for b in both), judged["ratio"])
        ]
        lines += [line(f"  {name}", *(b[name] for b in both)) for name in both[0] if name != "correct"]
        lines += [line(f"  teacher at {n} steps", "", share) for n, share in fewer["accuracy"].items()]
    lines += [
        line("endpoint: latent relative error", endpoint["latent_relative_error"]),
        line("endpoint: PSNR, dB", endpoint["psnr_db"]),
        line("endpoint: SSIM", endpoint["ssim"]),
        *(line(f"  teacher at {n} steps: relative error", "", e) for n, e in fewer["latent_relative_error"].items()),
        f"  the student equals the teacher at {equal_steps(fewer)}",
    ]
    lines += noise_lines(results["noise"], line)
    if "velocity_error" in results:
        lines.append(line("relative velocity error", results["velocity_error"]["mean"]))
        for bucket in results["velocity_error"]["by_sigma"]:
            low, high = bucket["sigma"]
            lines.append(line(f"  sigma {low:.1f} to {high:.1f} ({bucket['count']} states)", bucket["mean"]))
    for name in ("high_frequency_energy", "prompt_sensitivity"):
        lines.append(compared(name.replace("_", " "), results[name]))
    for name, row in results["cost"].items():
        lines.append(compared(name.replace("_", " "), row))
    return lines


def noise_lines(noise: dict, line: Callable[..., str]) -> list[str]:
    """What the prompt decides and what the noise decides, each with its error, over all and by noise level."""
    lines = [
        line("what the prompt decides: error", noise["mean_error"]),
        line("what the noise decides: error, and its size", noise["noise_error"], noise["teacher_noise"]),
        line("  size, as a share of the teacher's", noise["norm_ratio"]),
        line("  direction: cosine to the teacher's", noise["cosine"]),
        line("  gain: share of the teacher's found in it", noise["gain"]),
    ]
    for bucket in noise.get("by_sigma", []):
        if bucket["gain"] is not None:
            low, high = bucket["sigma"]
            lines.append(line(f"  gain of x_0's, sigma {low:.1f} to {high:.1f}", bucket["gain"]))
    return lines + textwrap.wrap(noise["meaning"], 106, initial_indent="  ", subsequent_indent="  ")


def finite(values: object) -> object:
    """JSON knows no NaN and no infinity: both become null."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def equal_steps(fewer: dict) -> str:
    low, high = fewer["student_equals"]["at_least_steps"], fewer["student_equals"]["fewer_than_steps"]
    if low is None and high is None:
        return "(no smaller number of steps to compare with)"
    if low is None:
        return f"fewer than {high} steps"
    return f"{low} steps or more" if high is None else f"{low} to {high} steps"
