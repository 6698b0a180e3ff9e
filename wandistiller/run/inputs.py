"""What a run reads before torch loads: the student's config and the prompts. Standard library only."""

from dataclasses import dataclass

from wandistiller.files.clone import check_is_in_clone
from wandistiller.files.output_folder import check_output_folder
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import Prompts, read_prompts
from wandistiller.run.flags import Flags
from wandistiller.run.mistakes import check_flags


@dataclass(frozen=True)
class Inputs:
    """The student's config and the prompts of a run."""

    config: StudentConfig
    prompts: Prompts


def read_inputs(flags: Flags) -> Inputs:
    """Check the flags and read what needs no torch, in the order in which a person would look for a mistake.

    Raises:
        UserError: flags contradict each other, or a file is missing or wrong.
    """
    check_flags(flags)
    data, output = flags.data, flags.output
    student_config = flags.student.student_config
    check_is_in_clone(
        {"student_config": student_config, "data_path": data.data_path, "teacher_path": data.teacher_path}
    )
    config = StudentConfig.load(student_config)
    prompts = read_prompts(
        data.data_path,
        data.caption_column,
        num_prompts=data.num_prompts,
        seed=flags.optimization.seed,
        eval_prompts=None if output.eval_every == 0 else output.eval_prompts,
        prompt_per=data.prompt_per,
    )
    check_output_folder(output.output_dir)
    return Inputs(config, prompts)
