"""What the flags must know of each value of --states; targets/states.py builds the states themselves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StatesKind:
    """What the flags must know of a value of --states; targets/states.py builds the states themselves.

    Attributes:
        has_paths: whether its states lie on sampling paths, which a student can be rolled out on and which end in samples.
        renoise_fraction: the share of renoised samples that it trains on unless another is given.
    """

    help: str
    has_paths: bool = True
    renoise_fraction: float = 0.0


STATES = {
    "trajectory": StatesKind("the teacher's own sampling paths", renoise_fraction=0.25),
    "renoise": StatesKind("fresh noise mixed into the samples those end in", renoise_fraction=0.75),
    "noise": StatesKind("pure noise at every noise level", has_paths=False),
}
