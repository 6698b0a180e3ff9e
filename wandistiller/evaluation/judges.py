"""Judges of pictures: a person's own function, named as `--judge FILE.py:FUNCTION`, that rates pictures.

    def judge(pictures, prompts):    # pictures (N, H, W, 3) uint8, prompts: a list of N strings
        return [...]                 # N answers: True or False, or a dict of named facts and numbers

A fact "correct" says whether a picture is right, as True or False alone do. The function may raise ValueError for a prompt that it
cannot judge. The file is run as Python code, so only the command line names one; no record of a student or teacher can.
tools/demo_judge.py judges the demo's world, and tools/clip_judge.py any world, by a CLIP.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np

from wandistiller.errors import UserError, first_line

Verdict = dict[str, float]  # facts (0 or 1) and numbers of a picture by name; "correct" says whether it is right
Judge = Callable[[np.ndarray, Sequence[str]], list[Verdict]]
PROBE_SIDE = 64  # pixels of the grey picture that a prompt is tried with


def load_judge(location: str, prompts: Sequence[str]) -> Judge:
    """Load FILE.py:FUNCTION, and try it with the prompts before anything is drawn for them.

    Raises:
        UserError: there is no such file or function, the file fails as it is run, or the function refuses a prompt. The judge
            raises it too, where an answer is not as it should be.
    """
    flag = f"--judge {location}"
    name, _, function_name = location.rpartition(":")
    if not Path(name).is_file():
        raise UserError(f"{flag}: there is no such file; give FILE.py:FUNCTION, such as tools/demo_judge.py:judge_all")
    loader = SourceFileLoader("judge_of_the_command_line", name)
    # Where a dataclass looks for its module:
    module = sys.modules[loader.name] = module_from_spec(spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
    except Exception as error:  # whatever a person's file does, or it is no Python file
        raise UserError(f"{flag}: the file cannot be run ({first_line(error)})") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{flag}: the file has no function {function_name}")

    def judge(pictures: np.ndarray, prompts: Sequence[str]) -> list[Verdict]:
        try:
            answers = list(function(pictures, list(prompts)))
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from None
        verdicts = [answer if isinstance(answer, dict) else {"correct": answer} for answer in answers]
        try:
            found = [{name: float(value) for name, value in verdict.items()} for verdict in verdicts]
        except (TypeError, ValueError):
            found = []
        if len(found) != len(prompts) or any(verdict.keys() != found[0].keys() for verdict in found):
            raise UserError(
                f"{flag}: must return True, False or a dict of the same facts and numbers for each of {len(prompts)} pictures"
            )
        return found

    judge(np.full((len(prompts), PROBE_SIDE, PROBE_SIDE, 3), 128, np.uint8), prompts)
    return judge


def mean_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the share of pictures for which each fact holds, and the mean of each number."""
    return {name: statistics.fmean(verdict[name] for verdict in verdicts) for name in verdicts[0]}
