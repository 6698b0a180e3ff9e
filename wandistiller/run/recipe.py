"""How a student is made: what it records of that, and what a resumed run must keep, as two views of one thing."""

from dataclasses import dataclass, field, fields
from typing import Any


def part(*, recorded: bool = False, compared: bool = False) -> Any:
    """Declare a part of the recipe: whether the student records it, and whether a resumed run must keep it."""
    return field(metadata={"recorded": recorded, "compared": compared})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The flags that decide what a student becomes; the others say how long, how fast, and what is shown.

    What is recorded but not compared may differ on resume, or is compared by its contents instead: a teacher by its weights, prompts
    by their text. What is compared but not recorded here is recorded from where it was resolved, with the optimiser's options.
    """

    teacher_path: str = part(recorded=True)
    teacher_path_low: str | None = part(recorded=True)
    text_encoder_path: str | None = part(recorded=True)
    data_path: str = part(recorded=True)
    caption_column: str | None = part(recorded=True)
    extra_prompts: str | None = part(recorded=True)
    init: str = part(recorded=True, compared=True)
    init_expert: str = part(recorded=True, compared=True)
    image_sizes: list[str] | None = part(recorded=True)
    layers: list[int] | None = part(compared=True)
    states: str = part(recorded=True, compared=True)
    sigma_range: tuple[float, float] = part(recorded=True, compared=True)
    renoise_fraction: float = part(recorded=True, compared=True)
    student_rollout: tuple[float, float] = part(recorded=True, compared=True)
    prompt_swap: float = part(recorded=True, compared=True)
    calls_per_expert: int = part(recorded=True, compared=True)
    replay: int = part(recorded=True, compared=True)
    feature_loss_weight: float = part(recorded=True, compared=True)
    sigma_weighting: str = part(recorded=True, compared=True)
    student_steps: int | None = part(recorded=True, compared=True)
    teacher_dtype: str | None = part(recorded=True)
    optimizer: str = part(compared=True)
    seed: int = part(compared=True)

    def recorded(self) -> dict[str, Any]:
        """Return what student_config.json holds of the recipe."""
        return self._view("recorded")

    def compared(self) -> dict[str, object]:
        """Return what must be the same for a run to be resumed."""
        return self.teacher_storage() | self.several_sizes() | self._view("compared")

    def teacher_storage(self) -> dict[str, object]:
        """fp8 makes another teacher; fp32 and bf16 may change from one command to the next, as --dtype may."""
        return {"teacher_dtype": "fp8"} if self.teacher_dtype == "fp8" else {}

    def several_sizes(self) -> dict[str, object]:
        """Return the sizes that a run takes in turn; one of image_size alone has none, as before there were any others."""
        return {"image_sizes": self.image_sizes} if self.image_sizes else {}

    def _view(self, name: str) -> dict[str, Any]:
        return {known.name: getattr(self, known.name) for known in fields(self) if known.metadata[name]}
