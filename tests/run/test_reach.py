"""A run encodes the prompts that it can come to and no others, and learns what it would have learnt with all of them encoded.

The oracles: what the sources of states really take, counted at the order of the prompts; a run whose reach is all prompts; and
the shards of the cache, read with safetensors.

pytest tests/run/test_reach.py
"""

import json

import pytest
import torch
from safetensors import safe_open

from support.runs import PRUNED_CONFIG, weights_of
from support.states import make_noise, make_pool, make_renoised
from wandistiller.run import build, reach
from wandistiller.targets.prompt_order import PromptOrder, reached_prompts
from wandistiller.targets.trajectories import most_path_prompts, paths_per_lane
from wandistiller.wan.prompt_embeds import mock_prompt_embeds

NUM_PROMPTS = 700


@pytest.fixture
def many_prompts(tmp_path, monkeypatch):
    """More prompts than are encoded whatever a run can come to."""
    monkeypatch.setattr(reach, "FEW_PROMPTS", NUM_PROMPTS - 1)
    file = tmp_path / "many.txt"
    file.write_text("\n".join(f"a cat, number {index}" for index in range(NUM_PROMPTS)), encoding="utf-8")
    return file


def keys_in(cache) -> set[str]:
    found: set[str] = set()
    for file in cache.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            found.update(shard.keys())
    return found


# ---- how many are taken ----


def taken_by(states, num_batches: int, monkeypatch) -> int:
    for _ in range(num_batches):
        batch = states.draw()
        states.advance(batch, torch.zeros_like(batch.latents))
    paths = getattr(states, "paths", states)
    return paths.order.position


@pytest.mark.parametrize("num_steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("kind", ["paths", "renoised", "turns"])
def test_paths_take_no_more_prompts_than_is_said_and_not_far_fewer(monkeypatch, num_steps, kind):
    changes = {"num_steps": num_steps, "num_prompts": 100_000, "boundary": 0.875}
    if kind == "turns":
        changes["calls_per_expert"] = 4
    for num_batches in (1, 7, 40, 300):
        states = make_renoised(0.25, **changes) if kind == "renoised" else make_pool(**changes)
        taken, most = taken_by(states, num_batches, monkeypatch), most_path_prompts(num_batches, 8, num_steps, 8)
        assert taken <= most
        if kind == "paths" and num_batches == 300:
            assert most < 2.5 * taken


def test_noise_takes_a_prompt_for_every_state(monkeypatch):
    assert taken_by(make_noise(1000, 4), 9, monkeypatch) == 36


# ---- the order ----


def test_all_prompts_come_in_the_order_of_torch_as_they_always_did():
    order = PromptOrder(50, seed=4)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        assert order.take(50) == torch.randperm(50, generator=generator).tolist()


def test_where_only_some_are_used_they_are_the_first_of_the_order_in_every_epoch():
    order, all_of_them = PromptOrder(50, seed=4, num_used=12), PromptOrder(50, seed=4)
    first = all_of_them.take(12)
    assert order.take(12) == first
    epochs = [order.take(12) for _ in range(4)]
    assert all(sorted(epoch) == sorted(first) for epoch in epochs) and epochs[0] != epochs[1]
    assert reached_prompts(50, 4, 12) == sorted(first) == reached_prompts(50, 4, 99, num_used=12)
    assert reached_prompts(50, 4, 99) == list(range(50))


def test_an_order_resumes_with_more_or_less_room():
    whole = PromptOrder(50, seed=4)
    whole.take(9)
    less, same = PromptOrder(50, seed=4, num_used=12), PromptOrder(50, seed=4)
    less.load_state_dict(whole.state_dict())
    same.load_state_dict(less.state_dict())
    assert less.take(3) == whole.take(3) == same.take(3)
    assert sorted(less.take(12)) == reached_prompts(50, 4, 12)
    for wrong in (torch.arange(51), torch.tensor([1, 1]), torch.tensor([], dtype=torch.long), torch.arange(50.0)):
        with pytest.raises(ValueError, match="does not hold each of them once"):
            same.load_state_dict(less.state_dict() | {"order": wrong})


def test_a_prompt_that_was_not_foreseen_is_embedded_when_it_comes():
    known = mock_prompt_embeds(["a", "b"], 4)
    embeds = known.placed([3, 7], 9, lambda index: torch.full((1, 4), float(index)))
    assert len(embeds) == 9 and torch.equal(embeds.read(7), known.read(1)) and embeds.read(5)[0, 0] == 5


# ---- runs ----


FLAGS = ("--batch_size", 2, "--eval_every", 0)


def test_only_reachable_prompts_are_encoded_and_the_student_is_the_same(
    train, teachers, many_prompts, tmp_path, monkeypatch
):
    few, full = tmp_path / "few", tmp_path / "full"
    flags = (*FLAGS, "--data_path", many_prompts, "--max_steps", 8)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--prompt_cache", few)
    assert outcome.code == 0, outcome.err
    encoded = len(keys_in(few)) - 1  # the negative prompt is one of them
    assert encoded == most_path_prompts(2, 2, 50, paths_per_lane(2))  # 8 steps with the default replay of 4
    assert f"Of them {encoded} are encoded" in outcome.out and f"Prompts: {NUM_PROMPTS}" in outcome.out

    with monkeypatch.context() as patched:  # everything is encoded, and then each run reads the same embeddings
        patched.setattr(build, "reachable_prompts", lambda run: range(NUM_PROMPTS))
        assert train(teachers.one, PRUNED_CONFIG, *flags, "--prompt_cache", full, output_dir=tmp_path / "all").code == 0
    assert len(keys_in(full)) == NUM_PROMPTS + 1
    assert train(teachers.one, PRUNED_CONFIG, *flags, "--prompt_cache", full, output_dir=tmp_path / "some").code == 0
    one, other = weights_of(tmp_path / "all"), weights_of(tmp_path / "some")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["noise", "segments", "cache"])
def test_other_states_find_all_their_prompts_encoded(train, teachers, many_prompts, tmp_path, monkeypatch, kind):
    flags = {
        "noise": ("--states", "noise"),
        "segments": ("--student_steps", 4),
        "cache": ("--teacher_cache", tmp_path / "answers"),
    }[kind]
    called = []
    embed = build._embed
    monkeypatch.setattr(build, "_embed", lambda run, texts: called.append(len(texts)) or embed(run, texts))
    for max_steps in (6, 3):
        called.clear()
        outcome = train(
            teachers.one, PRUNED_CONFIG, *FLAGS, *flags, "--data_path", many_prompts, "--max_steps", max_steps, "--replay", 1,
            "--prompt_cache", tmp_path / "cache", "--overwrite",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert len(called) == 2 and called[0] == called[1] < NUM_PROMPTS  # none was encoded late
        if kind != "cache":
            break


def test_a_longer_run_encodes_the_further_prompts(train, teachers, many_prompts, tmp_path):
    cache = tmp_path / "cache"
    flags = (
        *FLAGS,
        "--data_path",
        many_prompts,
        "--prompt_cache",
        cache,
        "--save_every",
        50,
        "--replay",
        1,
        "--states",
        "noise",
    )
    assert train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 4).code == 0
    first = keys_in(cache)
    longer = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 9)
    assert longer.code == 0 and "Resuming from step 4" in longer.out
    assert first < keys_in(cache) and (len(first), len(keys_in(cache))) == (9, 19)


def test_where_the_cache_has_too_little_room_fewer_prompts_are_used(train, teachers, many_prompts, tmp_path):
    flags = (*FLAGS, "--data_path", many_prompts, "--max_steps", 40, "--states", "noise", "--replay", 1)
    # 20 channels of float32 for some 10 tokens: about 800 bytes for each of the 80 prompts that are reached
    gib = 20_000 / 2**30
    outcome = train(
        teachers.one, PRUNED_CONFIG, *flags, "--prompt_cache", tmp_path / "cache", "--prompt_cache_gib", gib
    )
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if "--prompt_cache_gib" in line]
    used = int(line.split()[2])
    assert 10 < used < 80 and len(keys_in(tmp_path / "cache")) == used + 1 and line.endswith("could come to 80")
    values = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors"))
    assert values < 60_000  # with the headers of the shards
    for more, said in (
        (("--prompt_swap", 0.5), "--prompt_swap may come to any"),
        (("--prompt_cache_gib", 1e-9), "give more room"),
    ):
        outcome = train(
            teachers.one, PRUNED_CONFIG, *flags, "--prompt_cache", tmp_path / "new", "--prompt_cache_gib", gib, *more
        )
        assert outcome.code == 2 and said in outcome.err and not (tmp_path / "new").exists()


def test_a_run_on_templates_resumes_for_longer_and_not_with_others(train, teachers, tmp_path):
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "all.template.txt").write_text("a __n__ __n__ __n__ __n__ cat\n", encoding="utf-8")
    (folder / "n.txt").write_text("\n".join(f"w{index}" for index in range(30)), encoding="utf-8")
    flags = (
        *FLAGS,
        "--data_path",
        folder,
        "--prompt_cache",
        tmp_path / "cache",
        "--save_every",
        50,
        "--states",
        "noise",
        "--replay",
        1,
    )
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 4)
    assert outcome.code == 0 and "drawn from 1 templates, with seed 0" in outcome.out, outcome.err
    assert len(keys_in(tmp_path / "cache")) == 9
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 6)
    assert outcome.code == 0 and "Resuming from step 4" in outcome.out
    record = json.loads((tmp_path / "out" / "student_config.json").read_text())["distillation"]
    assert record["data_path"] == str(folder) and "caption_column" not in record
    (folder / "n.txt").write_text("other\nwords\n" * 30, encoding="utf-8")
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 8)
    assert outcome.code == 2 and "prompts" in outcome.err


def test_a_table_is_learnt_as_the_same_lines_of_text_are(train, teachers, tmp_path):
    prompts = ["a cat, asleep", "a dog", "猫"]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"words": prompt, "url": "x"}) for prompt in [*prompts, "", None]), encoding="utf-8"
    )
    flags = (*FLAGS, "--max_steps", 4)
    assert (
        train(teachers.one, PRUNED_CONFIG, *flags, "--data_path", tmp_path / "p.txt", output_dir=tmp_path / "a").code
        == 0
    )
    told = train(
        teachers.one,
        PRUNED_CONFIG,
        *flags,
        "--data_path",
        tmp_path / "p.jsonl",
        "--caption_column",
        "words",
        output_dir=tmp_path / "b",
    )
    assert told.code == 0 and "Prompts: 3 (2 rows left out: 2 without a caption)" in told.out
    one, other = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "b" / "student_config.json").read_text())["distillation"]["caption_column"] == "words"
