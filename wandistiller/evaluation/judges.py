"""Find the judge of the world that a teacher draws, so that evaluate_student.py can tell what share of its pictures is right."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wandistiller.errors import UserError
from wandistiller.evaluation import demo_judge, icon_judge
from wandistiller.files.clone import DEMO_WORLD
from wandistiller.wan.wan_files import WanFiles

Judge = Callable[[np.ndarray, str], dict[str, bool]]


def find_judge(wan_files: WanFiles, prompts: Sequence[str]) -> Judge | None:
    """Return the judge of the world that the teacher's record names; None where there is none, or its folder lacks the sheet.

    Raises:
        UserError: one of the prompts is not of that world, so that its pictures could not be judged.
    """
    world, folder = wan_files.record.get("world"), Path(wan_files.location)
    if world == DEMO_WORLD:
        read_prompt: Callable[[str], object] = demo_judge.read_prompt
        judge: Judge = demo_judge.judge
    elif world == icon_judge.WORLD and (folder / icon_judge.SHEET_NAME).is_file():
        icons = icon_judge.open_judge(folder)
        read_prompt, judge = icons.read_prompt, icons.judge
    else:  # an exported student names its teacher's world, but holds no pictographs
        return None
    for prompt in prompts:
        try:
            read_prompt(prompt)
        except ValueError as error:
            raise UserError(f"--prompts_file: {error}; this teacher is judged on prompts of its own world") from None
    return judge
