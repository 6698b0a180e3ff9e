"""WanLiteStudent and StudentConfig keep their promises through their public surface.

The oracle of the wan block is diffusers' 3D transformer at one frame, that of the shift diffusers' schedulers. No
student may hold anything 3D, and a bad config must be answered with a value that works.
"""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from support.runs import IDENTITY_CONFIG, file_size_limited
from support.wan_folders import oracle_velocity, random_transformer, random_weights, relative_error
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.model.config import ConfigError
from wandistiller.sampling.flow import shift_sigma, unshift_sigma

WAN = IDENTITY_CONFIG | {"depth": 2, "image_size": 64}
LITE = {name: value for name, value in WAN.items() if name not in ("ffn_dim", "patch_size", "freq_dim")} | {
    "block": "lite",
    "hidden_size": 32,
    "num_heads": 4,
    "num_channels": 4,
    "text_encoder_output_dim": 20,
}
OF_LITE = {"block": "lite"}


def student_of(values: dict, seed: int = 0, **changes) -> WanLiteStudent:
    student = WanLiteStudent(StudentConfig(**values | changes))
    random_weights(student, seed)
    return student.eval()


def inputs(config: StudentConfig, batch: int = 2, num_tokens: int = 7, height: int = 4, width: int = 6):
    generator = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, config.num_channels, height, width, generator=generator)
    timestep = 1000 * torch.rand(batch, generator=generator)
    return latents, timestep, torch.randn(batch, num_tokens, config.text_encoder_output_dim, generator=generator)


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


def as_diffusers(student: WanLiteStudent):
    """The 3D transformer of diffusers with a wan student's weights: kernel depth 1, nothing else changes."""
    config = student.config
    shape = {"heads": config.num_heads, "head_dim": config.head_dim, "layers": config.depth, "ffn_dim": config.ffn_dim}
    shape |= {"channels": config.num_channels, "text_dim": config.text_encoder_output_dim, "freq_dim": config.freq_dim}
    model = random_transformer(**shape, eps=config.eps)
    tensors = dict(student.state_dict())
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"][:, :, None]
    model.load_state_dict(tensors)
    return model


# ---- the wan block ----


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(4, 6), (12, 4), (2, 2)])
def test_the_wan_student_equals_diffusers_with_its_own_weights(height, width):
    student = student_of(WAN)
    given = (*inputs(student.config, batch=3, height=height, width=width), torch.tensor([0, 3, 7]))
    assert relative_error(student(*given), oracle_velocity(as_diffusers(student), *given)) <= 1e-5


@torch.no_grad()
def test_without_lengths_all_positions_are_used_as_they_come():
    student = student_of(WAN)
    given = inputs(student.config)
    expected = oracle_velocity(as_diffusers(student), *given)
    assert relative_error(student(*given), expected) <= 1e-5
    full = student(*given, prompt_lengths=torch.tensor([7, 7]))
    assert relative_error(full, expected) > 1e-3  # 505 pads more are another input


@torch.no_grad()
@pytest.mark.parametrize("text_max_length", [9, 512])
def test_folded_padding_equals_that_many_zero_tokens(text_max_length):
    student = student_of(WAN, text_max_length=text_max_length)
    latents, timestep, prompt_embeds = inputs(student.config)
    lengths = torch.tensor([2, 7])
    slots = torch.zeros(2, text_max_length, 20)
    slots[0, :2], slots[1, :7] = prompt_embeds[0, :2], prompt_embeds[1]
    assert relative_error(student(latents, timestep, prompt_embeds, lengths), student(latents, timestep, slots)) <= 1e-5


@torch.no_grad()
def test_what_stands_past_a_prompts_length_changes_nothing():
    student = student_of(WAN)
    latents, timestep, prompt_embeds = inputs(student.config)
    lengths = torch.tensor([2, 5])
    spoiled = prompt_embeds.clone()
    spoiled[0, 2:], spoiled[1, 5:] = float("nan"), 1e30
    ours = student(latents, timestep, prompt_embeds, lengths)
    assert torch.equal(ours, student(latents, timestep, spoiled, lengths))


@torch.no_grad()
@pytest.mark.parametrize("values", [WAN, LITE], ids=["wan", "lite"])
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(values):
    student = student_of(values)
    latents, timestep, prompt_embeds = inputs(student.config, batch=3)
    lengths = torch.tensor([1, 7, 4])
    together = student(latents, timestep, prompt_embeds, lengths)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = student(latents[one], timestep[one], prompt_embeds[one, :length], lengths[one])
        assert relative_error(alone, together[one]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("values", [WAN, LITE], ids=["wan", "lite"])
def test_timesteps_are_not_rounded(values):
    student = student_of(values)
    latents, _, prompt_embeds = inputs(student.config, batch=1)
    given = [student(latents, torch.tensor([t]), prompt_embeds) for t in (500.0, 500.25, 500.5)]
    assert not torch.equal(given[0], given[1]) and not torch.equal(given[1], given[2])
    for same in (500, 500.0, torch.tensor(500.0)):
        assert torch.equal(given[0], student(latents, same, prompt_embeds))


@torch.no_grad()
def test_the_bf16_student_keeps_to_its_float32_self():
    student = student_of(WAN)
    given = (*inputs(student.config), torch.tensor([3, 7]))
    expected = student(*given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = student(*given)
    assert mixed.dtype == torch.float32
    assert relative_error(mixed, expected) <= 0.02


def test_gradients_reach_every_parameter_and_the_latents():
    for values in (WAN, LITE):
        student = student_of(values).train()
        latents, timestep, prompt_embeds = inputs(student.config)
        student(latents.requires_grad_(), timestep, prompt_embeds, torch.tensor([3, 7])).square().mean().backward()
        without = [name for name, parameter in student.named_parameters() if not parameter.grad.any()]
        # A key's bias moves all logits of a query alike, which softmax does not see; Wan's norm_k comes after it.
        assert without == [] and latents.grad.any()


def test_a_student_used_under_inference_mode_can_still_be_trained():
    for values in (WAN, LITE):
        student = student_of(values)
        given = inputs(student.config, height=6, width=10)
        with torch.inference_mode():
            student(*given)
        student(*given).square().mean().backward()


@pytest.mark.parametrize("values", [WAN, LITE], ids=["wan", "lite"])
def test_no_student_holds_anything_3d(values):
    student = student_of(values)
    assert all(tensor.ndim <= 4 for tensor in student.state_dict().values())
    assert not any(isinstance(module, nn.Conv3d) for module in student.modules())


@pytest.mark.parametrize(
    "shapes", [((1, 16, 5, 4), (1, 3, 20)), ((1, 16, 1, 4, 4), (1, 3, 20)), ((1, 16, 4, 4), (1, 3, 21))]
)
def test_inputs_of_the_wrong_shape_are_refused_with_what_is_expected(shapes):
    student = student_of(WAN)
    with pytest.raises(ValueError, match=r"expected \(B, "):
        student(torch.zeros(shapes[0]), torch.tensor([1.0]), torch.zeros(shapes[1]))


def test_more_text_than_slots_is_refused():
    student = student_of(WAN, text_max_length=5)
    with pytest.raises(ValueError, match="text_max_length is 5"):
        student(*inputs(student.config), torch.tensor([7, 7]))


# ---- the lite block ----


def test_the_lite_student_of_the_original_size_has_exactly_its_parameters():
    shape = {"hidden_size": 256, "depth": 4, "num_heads": 4, "num_channels": 4, "image_size": 512}
    config = StudentConfig(block="lite", **shape)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in WanLiteStudent(config).parameters()) == 4_752_132


@torch.no_grad()
def test_the_lite_student_sees_the_mean_over_text_tokens_only():
    student = student_of(LITE)
    latents, timestep, prompt_embeds = inputs(student.config)
    mean = torch.stack([prompt_embeds[0, :3].mean(0), prompt_embeds[1].mean(0)])[:, None]
    expected = student(latents, timestep, mean)
    spoiled = prompt_embeds.clone()
    spoiled[0, 3:] = float("nan")
    torch.testing.assert_close(student(latents, timestep, spoiled, torch.tensor([3, 7])), expected)
    assert student(latents, timestep, prompt_embeds, torch.tensor([0, 7])).isfinite().all()


@torch.no_grad()
def test_the_lite_student_knows_where_a_token_is():
    student = student_of(LITE)
    latents, timestep, prompt_embeds = inputs(student.config, height=6, width=6)
    uniform = student(torch.zeros_like(latents), timestep, prompt_embeds)
    # No border is in reach of either kernel:
    assert relative_error(uniform[:, :, 2:3, 2:3], uniform[:, :, 2:3, 3:4]) > 1e-3


# ---- StudentConfig ----


@pytest.mark.parametrize("values", [WAN, LITE], ids=["wan", "lite"])
def test_a_config_goes_to_json_and_back(tmp_path, values):
    config = StudentConfig(**values | {"distillation": {"teacher": "Wan — 万", "shift": 12.0}})
    (tmp_path / "student_config.json").write_text(config.to_json(), encoding="utf-8")
    assert StudentConfig.load(tmp_path) == StudentConfig.load(tmp_path / "student_config.json") == config


def test_a_key_that_is_there_twice_is_refused():
    text = json.dumps(WAN)[:-1] + ', "depth": 3}'
    with pytest.raises(ConfigError, match=r'^my\.json: .*key "depth" is there twice'):
        StudentConfig.from_json(text, "my.json")


@pytest.mark.parametrize("values", [WAN, LITE], ids=["wan", "lite"])
def test_every_key_left_out_is_named(values):
    for key in values:
        with pytest.raises(ConfigError, match=f'missing key "{key}"'):
            StudentConfig.from_dict({k: value for k, value in values.items() if k != key})


@pytest.mark.parametrize(
    ("unknown", "near"),
    [("hiden_size", "hidden_size"), ("num_layers", "num_"), ("ffn_size", "ffn_dim"), ("Depth", "depth")],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(unknown, near):
    with pytest.raises(ConfigError, match=f'unknown key "{unknown}"; did you mean "{near}'):
        StudentConfig.from_dict(WAN | {unknown: 1})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 25}, "hidden_size=25 .* use 24 or 28"),
        ({"num_heads": 6}, "num_heads=4 or fewer"),
        ({"hidden_size": -24}, "hidden_size=-24"),
        ({"hidden_size": "24"}, "hidden_size='24' .* whole number"),
        ({"depth": True}, "depth=True .* whole number"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": 1}, "eps=1 is too large"),
        ({"freq_dim": 255}, "freq_dim=255 must be even; use 254 or 256"),
        ({"image_size": 101}, "image_size=101 is not divisible by patch_size=2; use 100 or 102"),
        (
            {"image_size": 100, "distillation": {"vae_scale_factor": 8}},
            "divisible by 16 = VAE factor 8 .* use 96 or 112",
        ),
        ({"image_size": 4, "distillation": {"vae_scale_factor": 4}}, "image_size=4 is not divisible by 8 .* use 8"),
        (
            {"image_size": 65536, "distillation": {"vae_scale_factor": 8}},
            "image_size=65536 is too large.* at most 16384",
        ),
        ({"image_size": 16 * 10**9}, "image_size=16000000000 is too large; allowed: at most 1000000"),
        ({"depth": 10**9}, "depth=1000000000 is too large; allowed: at most 1000"),
        (OF_LITE | {"hidden_size": 33, "num_heads": 1}, "hidden_size=33 .* use 32 or 34"),
        (OF_LITE | {"image_size": 100, "distillation": {"vae_scale_factor": 8}}, "not divisible by 8 .* use 96 or 104"),
        (OF_LITE | {"ffn_dim": 100}, "ffn_dim=100 .* 128"),
        (OF_LITE | {"patch_size": 2}, "patch_size=2 .* 1"),
        ({"block": "Wan"}, 'allowed: "wan", "lite" .nearest: "wan"'),
        ({"model_type": "WanLite"}, 'nearest: "WanLiteStudent"'),
        ({"distillation": [1]}, "distillation=.* object"),
        ({"distillation": {"vae_scale_factor": "8"}}, "vae_scale_factor"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_what_would(changes, said):
    with pytest.raises(ConfigError, match=said) as refusal:
        StudentConfig.from_dict((LITE if changes.get("block") == "lite" else WAN) | changes, "my.json")
    assert str(refusal.value).startswith("my.json: ") and "\n" not in str(refusal.value)


# ---- save and load ----


@pytest.mark.parametrize("values", [WAN, LITE], ids=["wan", "lite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_student_comes_back_bit_for_bit(tmp_path, values, dtype):
    student = student_of(values, distillation={"shift": 5.0}).to(dtype)
    student.save_pretrained(tmp_path)
    loaded = WanLiteStudent.from_pretrained(tmp_path)
    assert same_weights(student, loaded) and loaded.config == student.config
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    given = inputs(student.config)
    assert torch.equal(loaded(*given), student(*given))
    with safe_open(tmp_path / "diffusion_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["student_config"]) == student.config.to_dict()


def test_a_save_on_a_full_disk_leaves_the_student_that_was_there(tmp_path):
    old = student_of(WAN, seed=1)
    old.save_pretrained(tmp_path)
    with file_size_limited(10_000), pytest.raises(OSError, match=r"File too large|Error while serializing"):
        student_of(WAN, seed=2).save_pretrained(tmp_path)
    assert same_weights(WanLiteStudent.from_pretrained(tmp_path), old)
    assert len(os.listdir(tmp_path)) == 2


def test_weights_of_another_shape_are_refused(tmp_path):
    student = student_of(WAN)
    student.save_pretrained(tmp_path)
    for changes in ({"depth": 3}, {"depth": 1}, {"ffn_dim": 48}):
        (tmp_path / "student_config.json").write_text(dataclasses.replace(student.config, **changes).to_json())
        with pytest.raises(ConfigError, match=r"student as its student_config\.json says") as refusal:
            WanLiteStudent.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)


def test_missing_alien_or_truncated_weights_are_refused(tmp_path):
    student_of(WAN).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    save_file(tensors | {"stranger": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="stranger"):
        WanLiteStudent.from_pretrained(tmp_path)
    path.unlink()
    path.write_bytes(whole[:500])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        WanLiteStudent.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match="there is no such file"):
        WanLiteStudent.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere: there is no such file or folder; a student is"):
        WanLiteStudent.from_pretrained(tmp_path / "nowhere")


# ---- noise levels ----


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_shift_is_that_of_diffusers_unipc(shift):
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(20)
    u = torch.linspace(1, 1 / 1000, 21, dtype=torch.float64)[:-1]
    torch.testing.assert_close(shift_sigma(u, shift).float(), scheduler.sigmas[:-1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 12.0])
def test_unshift_undoes_shift(shift):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(unshift_sigma(shift_sigma(u, shift), shift), u)
    torch.testing.assert_close(shift_sigma(unshift_sigma(u, shift), shift), u)
