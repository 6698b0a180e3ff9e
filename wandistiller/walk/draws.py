"""Random numbers that depend on their key alone, so that no generator's state is saved and no process draws for another."""

from functools import lru_cache

import numpy as np


def rng(*key: int) -> np.random.Generator:
    """Return the random numbers of a key, the same in every process (Philox, a counter-based generator).

    A key is (seed, image size, what is drawn, ...); what follows is a slot and its own counter, or a group of slots and a call.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


# What is drawn: the third number of every key.
PROMPT_ORDER, PATH, FIRST_LEVELS, OTHER_WORDS, CALL, SAMPLE, CACHE_ORDER, FRESH_NOISE = range(8)


@lru_cache(maxsize=8)
def permutation(key: tuple[int, ...], count: int) -> np.ndarray:
    """Return an order (count,) of things, which is kept because many slots take from the same one."""
    return rng(*key).permutation(count)


def dealt_prompt(key: tuple[int, ...], place: int, num_prompts: int) -> int:
    """Return the prompt at a place of an order without end: every prompt once an epoch, in another order each epoch.

    Slot s of S takes places s, s + S, s + 2 S, ..., so that the slots together use each prompt once before any comes again.
    """
    epoch, index = divmod(place, num_prompts)
    return int(permutation((*key, PROMPT_ORDER, epoch), num_prompts)[index])
