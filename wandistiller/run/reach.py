"""Which prompts a run can come to, so that only these are encoded, and how many of them --prompt_cache_gib has room for."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wandistiller.errors import UserError
from wandistiller.run.states_kinds import STATES
from wandistiller.targets.prompt_order import reached_prompts
from wandistiller.targets.replay import answered_batches
from wandistiller.targets.segments import most_segment_prompts
from wandistiller.targets.shares import Share
from wandistiller.targets.states import pool_per_lane
from wandistiller.targets.trajectories import most_path_prompts
from wandistiller.wan.text_encoder import EncodingOptions, count_tokens

if TYPE_CHECKING:
    from wandistiller.run.plan import Plan
    from wandistiller.run.run import Run
    from wandistiller.wan.text_encoder_files import TextEncoderFiles

# The tokens of so many prompts stand for those of all of them.
NUM_COUNTED_PROMPTS = 256
# So few prompts are encoded whatever a run can come to: that costs little, and their embeddings, which in their last bits depend on
# what is encoded together, stay the same when a run is made longer.
FEW_PROMPTS = 4096


def most_reached(plan: "Plan") -> int:
    """Return how many prompts a run can come to at most: of those that come in turn, or by --prompt_swap any of them."""
    if plan.flags.states.prompt_swap:
        return len(plan.trained_texts)
    return min(most_taken(plan), len(plan.texts.prompts))


def most_encoded(plan: "Plan") -> int:
    """Return how many prompts a run encodes at most."""
    return len(plan.trained_texts) if encodes_all(plan) else plan.num_used or most_reached(plan)


def encodes_all(plan: "Plan") -> bool:
    """Return whether a run encodes all prompts: they are few and have room, or --prompt_swap may come to any of them."""
    few = len(plan.trained_texts) <= FEW_PROMPTS and longest_bytes(plan, len(plan.trained_texts)) <= room_bytes(plan)
    return plan.num_used is None and (few or plan.flags.states.prompt_swap > 0)


def most_taken(plan: "Plan") -> int:
    """Return how many prompts are taken in turn at most, over the whole run and all its image sizes."""
    return sum(most_taken_at(plan, share) for share in shares_of(plan))


def shares_of(plan: "Plan") -> list[Share]:
    """Return the share of each image size."""
    count = len(plan.image_sizes)
    return [Share(index, count) for index in range(count)]


def most_taken_at(plan: "Plan", share: Share) -> int:
    """Return how many prompts are taken in turn at most at one image size."""
    states, num_lanes = plan.flags.states, plan.lanes.total
    # Parts of a cache are dealt the prompts in turn: none comes further than so many times what the largest takes.
    num_parts = states.cache_parts
    num_batches = math.ceil(answered_batches(share.of(plan.num_steps), states.replay) / num_parts)
    if not STATES[states.states].has_paths:
        return num_parts * num_batches * num_lanes
    if num_segments := plan.flags.objective.student_steps:
        return most_segment_prompts(num_batches, num_lanes, num_segments)
    per_lane = pool_per_lane(plan.states_options, plan.settings, num_lanes)
    return num_parts * most_path_prompts(num_batches, num_lanes, plan.settings.num_inference_steps, per_lane)


def reachable_prompts(run: "Run") -> Sequence[int]:
    """Return the indices of the prompts that a run needs embeddings of, in ascending order."""
    if encodes_all(run):
        return range(len(run.trained_texts))
    num_prompts, seed = len(run.texts.prompts), run.flags.optimization.seed
    reached: set[int] = set(range(min(run.flags.output.num_samples, num_prompts)))  # those of the sample pictures
    if run.caches and all(cache.is_complete for cache in run.caches):
        return sorted(reached.union(*(cache.prompts_asked_with() for cache in run.caches)))
    if most_taken(run) >= num_prompts and run.num_used is None:
        return range(num_prompts)
    for share in shares_of(run):
        taken, used = most_taken_at(run, share), share.used(run.num_used)
        reached |= set(reached_prompts(num_prompts, share.seed(seed), taken, used))
    return sorted(reached)


# ---- room for their embeddings ----


def room_bytes(plan: "Plan") -> float:
    """Return the bytes that embeddings of the prompts may take; the mock's are made when they are needed, and not kept."""
    return plan.flags.data.prompt_cache_gib * 2**30 if plan.encoder else math.inf


def token_bytes(plan: "Plan") -> int:
    """Return the bytes of a token's embedding."""
    return plan.config.text_encoder_output_dim * EncodingOptions(device=plan.device).encoder_dtype.itemsize


def longest_bytes(plan: "Plan", num_prompts: int) -> int:
    """Return the bytes of so many embeddings that fill all text slots."""
    return num_prompts * plan.config.text_max_length * token_bytes(plan)


def within_prompt_cache(plan: "Plan") -> int | None:
    """Return how many prompts a run uses where --prompt_cache_gib has no room for all that it can come to; None where it has.

    Raises:
        UserError: there is no room for any, or --prompt_swap comes to all of them.
    """
    room, wanted = room_bytes(plan), most_reached(plan)
    if longest_bytes(plan, wanted) <= room:
        return None
    counts = token_counts(some_of(plan.trained_texts), plan.encoder)
    prompt_bytes = token_bytes(plan) * sum(min(count, plan.config.text_max_length) for count in counts) / len(counts)
    if wanted * prompt_bytes <= room:
        return None
    affordable = int(room / prompt_bytes)
    why = (
        f"the embeddings of {wanted} prompts, about {prompt_bytes / 2**10:,.0f} KiB each, take {wanted * prompt_bytes / 2**30:.3g} "
        "GiB"
    )
    if plan.flags.states.prompt_swap:
        raise UserError(
            f"--prompt_cache_gib {plan.flags.data.prompt_cache_gib:g}: {why}, and --prompt_swap may come to any of them; leave that "
            "out, give fewer prompts or more room"
        )
    if not affordable:
        raise UserError(f"--prompt_cache_gib {plan.flags.data.prompt_cache_gib:g}: {why}; give more room")
    return affordable


def some_of(prompts: Sequence[str]) -> Sequence[str]:
    """Return some prompts, evenly spread, that stand for all of them."""
    return prompts[:: max(1, len(prompts) // NUM_COUNTED_PROMPTS)][:NUM_COUNTED_PROMPTS]


def token_counts(texts: Sequence[str], encoder: "TextEncoderFiles | None") -> list[int]:
    """Count the tokens of texts with the run's own tokenizer; where there is none (the mock) words count."""
    return count_tokens(texts, encoder) if encoder else [len(text.split()) + 1 for text in texts]
