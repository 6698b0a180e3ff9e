"""Every layout of a Wan checkpoint is read and projected to its own shape, and what is no text-to-video Wan is refused.

The oracle is diffusers' 3D transformer at one frame, for every released structure at tiny widths. Reading opens
headers only, follows no path outside the folder, and opens no pickle.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.layout_checks import MAX_ERROR, assert_exact, refusal
from support.loras import comfyui_keys, random_pairs, write
from support.wan_folders import (
    A14B_SHAPE,
    oracle_velocity,
    original_tensors,
    random_transformer,
    relative_error,
    to_original,
    with_weights,
    write_hollow_file,
    write_original_folder,
    write_original_transformer,
    write_original_two_experts,
    write_pipeline_folder,
    write_single_file,
    write_transformer_folder,
)
from wandistiller.errors import UserError
from wandistiller.files.weights import kept_digest
from wandistiller.model.config import StudentConfig
from wandistiller.projection.project import project_teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.names import side_of
from wandistiller.wan.settings import resolve_settings, warnings_about
from wandistiller.wan.text_encoder_files import TextEncoderFiles, find_text_encoder
from wandistiller.wan.transformer_files import teacher_tensor_shapes
from wandistiller.wan.vae import find_vae
from wandistiller.wan.wan_files import merge_loras

RELEASED = {  # the structure of each released model at tiny widths
    "Wan2.1-T2V-1.3B": {"heads": 2, "head_dim": 128, "layers": 1, "ffn_dim": 96},
    "Wan2.1-T2V-14B": {"heads": 5, "head_dim": 12, "layers": 4, "ffn_dim": 54},
    "Wan2.2-T2V-A14B": {"heads": 5, "head_dim": 10, "layers": 4, "ffn_dim": 54, "two_experts": True},
    "Wan2.2-TI2V-5B": {"heads": 3, "head_dim": 16, "layers": 3, "ffn_dim": 80, "channels": 48},
}
TINY = {"heads": 2, "head_dim": 12, "layers": 2, "ffn_dim": 40, "channels": 16, "text_dim": 20}


def assert_same_as_diffusers(path: Path, experts: list) -> None:
    """Projected at its own shape, each expert equals diffusers' 3D model at one frame."""
    wan_files = open_wan_files(path)
    assert list(wan_files.experts) == ["high", "low"][: len(experts)]
    for name, expert in zip(wan_files.experts, experts, strict=True):
        assert_exact(*project_teacher(path, expert=name), expert)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


# ---- the names written by these tests ----


def test_the_original_names_of_the_tests_are_those_diffusers_converts_from():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = random_transformer(**TINY)
    converted = convert_wan_transformer_to_diffusers(original_tensors(model))
    assert set(converted) == set(model.state_dict())
    assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())


# ---- invariant 1: equal to diffusers at one frame, for every released structure and layout ----


@pytest.mark.parametrize("released", RELEASED)
@pytest.mark.parametrize("max_shard_size", ["10GB", "40KB"])
def test_a_pipeline_folder_of_every_released_structure_equals_diffusers(tmp_path, released, max_shard_size):
    experts = write_pipeline_folder(tmp_path, max_shard_size=max_shard_size, **RELEASED[released])
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (max_shard_size == "40KB")
    assert_same_as_diffusers(tmp_path, experts)


@pytest.mark.parametrize("released", [name for name in RELEASED if name != "Wan2.2-T2V-A14B"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_an_original_folder_equals_diffusers(tmp_path, released, num_shards):
    model = write_original_folder(tmp_path / "one", num_shards=num_shards, **RELEASED[released])
    assert_same_as_diffusers(tmp_path / "one", [model])


def test_an_original_folder_of_two_experts_equals_diffusers_and_a_missing_one_is_named(tmp_path):
    experts = write_original_two_experts(tmp_path, num_shards=2, **TINY)
    assert_same_as_diffusers(tmp_path, experts)
    shutil.rmtree(tmp_path / "low_noise_model")
    assert "low_noise_model" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bare_transformer_folder_in_any_precision_equals_diffusers(tmp_path, dtype):
    assert_same_as_diffusers(tmp_path, [write_transformer_folder(tmp_path, dtype=dtype, **TINY)])


@pytest.mark.parametrize("fp8", [None, "plain", "scaled", "comfy_quant"])
def test_a_single_file_equals_diffusers_with_the_weights_it_holds(tmp_path, fp8):
    model = write_single_file(tmp_path / "wan.safetensors", fp8=fp8, heads=1, ffn_dim=48)
    assert_same_as_diffusers(tmp_path / "wan.safetensors", [model])


PREFIXES = ["model.diffusion_model.", "net.", "_orig_mod.", "pipe.dit.", "module._orig_mod.", "whatever.it.is."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_any_prefix_is_taken_off(tmp_path, prefix, names):
    path = tmp_path / "wan.safetensors"
    model = write_single_file(path, heads=1, layers=1, ffn_dim=48)
    tensors = load_file(path) if names == "original" else model.state_dict()
    compiled = {re.sub(r"(blocks\.\d\.)", r"\1_orig_mod.", name): value.clone() for name, value in tensors.items()}
    save_file({prefix + name: value for name, value in compiled.items()}, path)
    assert_same_as_diffusers(path, [model])


def test_a_checkpoint_of_torch_save_equals_diffusers_and_more_than_tensors_is_refused(tmp_path):
    model = write_single_file(tmp_path / "wan.safetensors", heads=1, layers=1, ffn_dim=48)
    tensors = load_file(tmp_path / "wan.safetensors")
    for name, content in {"plain.pth": tensors, "of a trainer.PTH": {"state_dict": tensors, "epoch": 3}}.items():
        torch.save(content, tmp_path / name)
        assert_same_as_diffusers(tmp_path / name, [model])
    torch.save({"generator": tensors, "generator_ema": tensors}, tmp_path / "two.pth")
    assert "holds several models ('generator', 'generator_ema')" in refusal(tmp_path / "two.pth")
    with zipfile.ZipFile(tmp_path / "long.pth", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(2**26 + 1))
    assert "its archive/data.pkl has 67,108,865 bytes" in refusal(tmp_path / "long.pth")
    torch.save(tensors | {"x": Path("a")}, tmp_path / "object.pth")
    assert "pickle of more than tensors" in refusal(tmp_path / "object.pth")
    content = (tmp_path / "plain.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 2])
    assert "no whole checkpoint" in refusal(tmp_path / "short.pth")


def test_an_all_in_one_checkpoint_gives_its_transformer_and_names_the_other_parts(tmp_path):
    path = tmp_path / "all_in_one.safetensors"
    model = write_single_file(path, prefix="model.diffusion_model.", heads=1, layers=1, ffn_dim=48)
    others = {
        "first_stage_model.conv1.weight": torch.zeros(4, 4),
        "text_encoders.umt5xxl.transformer.shared.weight": torch.zeros(4, 4, dtype=torch.float16),
        "text_encoders.umt5xxl.spiece_model": torch.zeros(99, dtype=torch.uint8),
    }
    save_file(
        load_file(path) | others | {"model_type.SkyReels-V2-T2V-14B-540P": torch.zeros(1, dtype=torch.uint8)}, path
    )
    assert_same_as_diffusers(path, [model])
    assert set(others) < set(open_wan_files(path).experts["high"].ignored)


def test_a_folder_whose_tensors_are_a_wans_is_one_whatever_its_pipeline_is_called(tmp_path):
    experts = write_pipeline_folder(tmp_path / "sky", flow_shift=8.0)
    edit_json(tmp_path / "sky" / "model_index.json", _class_name="SkyReelsV2Pipeline")
    assert_same_as_diffusers(tmp_path / "sky", experts)
    wan_files = open_wan_files(tmp_path / "sky")
    (said,) = warnings_about(wan_files, resolve_settings(wan_files), wan_files.config)
    assert "SkyReelsV2Pipeline" in said and "--shift" in said
    (tmp_path / "sky" / "model_index.json").rename(tmp_path / "sky" / "modular_model_index.json")
    assert_same_as_diffusers(tmp_path / "sky", experts)
    shutil.rmtree(tmp_path / "sky" / "transformer")
    assert "or the repository that its parts lie in" in refusal(tmp_path / "sky")


def test_the_root_of_a_hub_cache_and_the_home_folder_lead_to_the_model(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--Wan-AI--Wan" / "snapshots" / "abc"
    experts = write_pipeline_folder(snapshot)
    (tmp_path / "models--Wan-AI--Wan" / "refs").mkdir()
    (tmp_path / "models--Wan-AI--Wan" / "refs" / "main").write_bytes(b"\xff")
    assert_same_as_diffusers(tmp_path / "models--Wan-AI--Wan", experts)
    (snapshot.parent / "def").mkdir()
    (tmp_path / "models--Wan-AI--Wan" / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same_as_diffusers("~/models--Wan-AI--Wan", experts)
    assert find_text_encoder("~/models--Wan-AI--Wan").encoder == snapshot / "text_encoder"
    assert "no such file or folder" in refusal("~nobody-of-this-name/wan")
    linked = tmp_path / os.fsdecode(b"no text \xff")
    linked.symlink_to(snapshot)
    assert_same_as_diffusers(linked, experts)
    assert open_wan_files(linked).fingerprint() == open_wan_files(snapshot).fingerprint()


def test_a_comfyui_folder_gives_its_wan_or_the_two_experts_that_their_names_tell_apart(tmp_path):
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    low = write_single_file(folder / "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", heads=1, ffn_dim=48, seed=2)
    assert_same_as_diffusers(tmp_path / "models", [low])
    high = write_single_file(folder / "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", heads=1, ffn_dim=48, seed=1)
    write_single_file(folder / "wan2.2_i2v_high_noise_14B.safetensors", heads=1, ffn_dim=48)
    assert_same_as_diffusers(tmp_path / "models", [high, low])
    assert_same_as_diffusers(tmp_path, [high, low])  # ComfyUI's own folder, which models/ lies in
    (folder / "5B").mkdir()
    write_single_file(folder / "5B" / "wan2.2_ti2v_5B_fp16.safetensors", heads=1, ffn_dim=48)
    message = refusal(tmp_path / "models")
    assert "wan2.2_ti2v_5B" in message
    write_single_file(folder / "wan2.1_t2v_1.3B.safetensors", heads=1, ffn_dim=48)
    message = refusal(tmp_path / "models")
    assert "wan2.1_t2v_1.3B" in message and "--teacher_path_low" in message


SIDES = {
    "wan2.2_t2v_high_noise_14B_fp16.safetensors": "high",
    "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors": "low",
    "wan2.2-t2v-a14b-high-Q8_0.gguf": "high",
    "HighNoise/wan-Q8_0.gguf": "high",
    "low_noise_model": "low",
    "wan2.1_t2v_14B_bf16.safetensors": None,
    "Wan22_A14B_T2V_LOW_Lightning_4steps_lora_250928_rank64_fp16.safetensors": "low",
    "wan2.2_t2v_A14b_HIGH_lightx2v_4step_1217.safetensors": "high",
    "Wan2.2-A14B-Low-Step-Lightning-Q4.gguf": None,
    "wan_high_and_low.safetensors": None,
}


@pytest.mark.parametrize("name", SIDES)
def test_the_names_that_people_give_experts_are_understood(name):
    assert side_of(Path("models") / name) == SIDES[name]


def test_experts_and_loras_the_wrong_way_round_and_one_alone_are_told(tmp_path):
    names = {side: tmp_path / f"Wan2_2-T2V-A14B-{side}_fp8.safetensors" for side in ("HIGH", "LOW")}
    for side, path in names.items():
        write_single_file(path, heads=1, layers=1, ffn_dim=48, seed=len(side))

    def told(wan_files) -> str:
        return " ".join(warnings_about(wan_files, resolve_settings(wan_files), wan_files.config))

    right, wrong = open_wan_files(names["HIGH"], names["LOW"]), open_wan_files(names["LOW"], names["HIGH"])
    assert "swapped" not in told(right) and told(wrong).count("swapped; exchange --teacher_path and") == 2
    assert "looks like one of two experts" in told(open_wan_files(names["LOW"]))
    assert "is given as both experts" in refusal(names["LOW"], low_noise_path=names["LOW"])
    copied = shutil.copy(names["LOW"], tmp_path / "wan_copied.safetensors")
    with pytest.raises(UserError, match="is given as both experts"):
        open_wan_files(copied, names["LOW"]).fingerprint()
    pairs = random_pairs(random_transformer(heads=1, head_dim=128, layers=1, ffn_dim=48))
    for side in ("HIGH", "LOW"):  # renamed, so that only the title tells
        save_file(
            load_file(names[side]), tmp_path / f"{len(side)}.safetensors", {"modelspec.title": f"Wan {side} noise"}
        )
    assert told(open_wan_files(tmp_path / "3.safetensors", tmp_path / "4.safetensors")).count("swapped") == 2
    lora = write(tmp_path / "4steps-lora_LOW_fp16.safetensors", comfyui_keys(pairs))
    assert "swapped; exchange --teacher_lora and" in told(merge_loras(right, [(lora, 1.0)]))
    assert "swapped" not in told(merge_loras(right, None, [(lora, 1.0)]))


def test_every_byte_of_every_file_is_in_the_fingerprint_and_no_name(tmp_path):
    write_original_two_experts(tmp_path / "a", num_shards=2, **TINY)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    expected = open_wan_files(tmp_path / "a").fingerprint()
    assert open_wan_files(tmp_path / "b").fingerprint() == expected
    for path in sorted((tmp_path / "b").rglob("*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert open_wan_files(tmp_path / "b").fingerprint() != expected, path
        path.write_bytes(content)


def test_the_text_encoder_is_in_the_fingerprint_and_large_digests_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    write_pipeline_folder(tmp_path / "wan")
    wan_files = open_wan_files(tmp_path / "wan")
    asked = replace(wan_files, encoder=wan_files.text_encoder())
    before = asked.fingerprint()
    weights = tmp_path / "wan" / "text_encoder" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert wan_files.fingerprint() != before != asked.fingerprint()
    assert not (tmp_path / "kept").exists()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**26)
    assert kept_digest(tmp_path / "large") == hashlib.sha256(bytes(2**26)).hexdigest()
    (kept,) = (tmp_path / "kept" / "wandistiller" / "digests").iterdir()
    assert kept.read_text() == kept_digest(tmp_path / "large")


@pytest.mark.parametrize("name, value", [("weight", float("nan")), ("bias", float("inf")), ("scale_weight", -1.0)])
def test_a_number_that_is_none_is_refused_when_its_tensor_is_read(tmp_path, name, value):
    path = tmp_path / "wan.safetensors"
    write_single_file(path, heads=1, layers=1, ffn_dim=48)
    tensors = {"blocks.0.ffn.0.scale_weight": torch.ones(1)} | load_file(path)
    tensors[f"blocks.0.ffn.0.{name}"].view(-1)[-1] = value
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"0\.ffn\.0\.(weight|bias) holds numbers that are not finite") as refused:
        project_teacher(path)
    assert f"blocks.0.ffn.0.{name}" in str(refused.value)


@pytest.mark.parametrize("shape", [(48,), (48, 1), (6, 4), ()])
def test_scales_of_rows_blocks_and_tensors_are_multiplied_and_others_refused(tmp_path, shape):
    path, name = tmp_path / "wan.safetensors", "blocks.0.ffn.0"
    model = write_single_file(path, fp8="scaled", heads=1, ffn_dim=48, channels=48)
    tensors, scale, held = load_file(path), torch.rand(shape) + 0.5, model.state_dict()
    spread = torch.kron(scale, torch.ones(8, 32)) if shape == (6, 4) else scale.reshape(-1, 1)
    held["blocks.0.ffn.net.0.proj.weight"] = tensors[f"{name}.weight"].float() * spread
    save_file(tensors | {f"{name}.scale_weight": scale}, path)
    assert_same_as_diffusers(path, [with_weights(model, held)])


def test_a_file_inside_a_diffusers_folder_takes_its_heads_from_the_config_beside_it(tmp_path):
    model = write_transformer_folder(tmp_path, heads=8, head_dim=32, layers=1, ffn_dim=40)
    assert_same_as_diffusers(tmp_path / "diffusion_pytorch_model.safetensors", [model])


# ---- what the folder says ----


def test_the_pipeline_folder_says_its_shift_boundary_latents_and_vae_factor(tmp_path):
    write_pipeline_folder(tmp_path, two_experts=True, boundary_ratio=0.7, flow_shift=4.5, channels=48)
    wan_files = open_wan_files(tmp_path)
    vae = json.loads((tmp_path / "vae" / "config.json").read_text())
    latents = {name: vae[name] for name in ("latents_mean", "latents_std")}
    assert wan_files.record == {"shift": 4.5, "boundary_ratio": 0.7, "vae_scale_factor": 16, **latents}
    both = TextEncoderFiles(tmp_path / "text_encoder", tmp_path / "tokenizer")
    assert wan_files.text_encoder() == both
    assert find_text_encoder(tmp_path / "text_encoder") == both


def test_a_single_file_has_no_text_encoder_and_says_so_and_other_types_of_files_are_no_wan(tmp_path):
    write_single_file(tmp_path / "wan.safetensors", heads=1, ffn_dim=48)
    with pytest.raises(UserError, match="--text_encoder_path"):
        open_wan_files(tmp_path / "wan.safetensors").text_encoder()
    for name in ("wan.ckpt", "wan.pth", "wan"):
        (tmp_path / name).write_bytes(b"GGUF")
        assert "safetensors" in refusal(tmp_path / name)


def test_opening_reads_headers_only_of_a_file_larger_than_memory(tmp_path):
    """The file is a hole of 300 GB, which takes no disk; its header is true."""
    config = StudentConfig(block="wan", image_size=512, **A14B_SHAPE | {"depth": 200})
    shapes = {to_original(name): shape for name, shape in teacher_tensor_shapes(config).items()}
    assert write_hollow_file(tmp_path / "wan.safetensors", shapes, "F32") > 2**38
    start = time.monotonic()
    wan = open_wan_files(tmp_path / "wan.safetensors").experts["high"]
    assert wan.config.depth == 200 and not wan.read("blocks.199.attn1.to_q.bias").any()
    assert time.monotonic() - start < 100  # a read of 300 GB takes longer


# ---- other kinds of Wan, refused by name ----


OTHER_PIPELINES = {
    "WanImageToVideoPipeline": "image-to-video",
    "WanVACEPipeline": "VACE",
    "WanAnimatePipeline": "Animate",
    "StableDiffusionXLPipeline": "is that of a StableDiffusionXLPipeline; give a WanPipeline",
}


@pytest.mark.parametrize("pipeline", OTHER_PIPELINES)
def test_other_pipelines_are_refused_by_name(tmp_path, pipeline):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert OTHER_PIPELINES[pipeline] in refusal(tmp_path)


# ---- contradictions and damage ----


def test_a_file_beside_an_index_of_others_is_refused(tmp_path):
    write_transformer_folder(tmp_path / "wan", **TINY)
    file = tmp_path / "wan" / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": {"a": file.name}}
    (place := file.with_name(f"{file.name}.index.json")).write_text(json.dumps(index))
    open_wan_files(tmp_path / "wan")
    shutil.copy(file, file.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    place.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}))
    assert f"holds {file.name} and {place.name} of other files" in refusal(tmp_path / "wan")


# Changes of an original release's config.json, and what the refusal says
WRONG_CONFIGS = {
    key: ({key: 7}, "config.json says")
    for key in (
        "num_layers",
        "ffn_dim",
        "dim",
        "in_dim",
        "out_dim",
        "out_channels",
        "freq_dim",
        "text_dim",
        "patch_size",
    )
}
WRONG_CONFIGS |= {
    "num_attention_heads": ({"num_heads": 7, "attention_head_dim": 12}, "config.json says 7 heads of 12"),
    "two counts of heads": ({"num_attention_heads": 4}, "config.json says 4 and 2 heads"),
    "patches": ({"patch_size": [1, 4, 4]}, "config.json says patch_size [1, 4, 4], the tensors have [1, 2, 2]"),
    "head_dim": ({"num_heads": None, "attention_head_dim": 7}, "is not a multiple of head_dim 7"),
    "i2v": ({"model_type": "i2v"}, "image-to-video"),
    "flf2v": ({"model_type": "flf2v"}, "FLF2V"),
    "VACE": ({"_class_name": "VaceWanModel"}, "VACE"),
    "Animate": ({"_class_name": "WanAnimateModel"}, "Animate"),
    "S2V": ({"_class_name": "WanModel_S2V"}, "S2V"),
    "given pictures": ({"added_kv_proj_dim": 24}, "(I2V)"),
    "nonsense": ({"eps": "small"}, "eps is 'small'; allowed"),
    "words": ({"num_heads": "two"}, "num_heads is 'two'; allowed"),
    "heads that do not divide": ({"num_heads": 5}, "cannot work"),
    "other mathematics": ({"qk_norm": "rms_norm"}, "qk_norm 'rms_norm'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_disagrees_or_is_of_another_kind_is_refused(tmp_path, case):
    changes, said = WRONG_CONFIGS[case]
    write_original_transformer(tmp_path, random_transformer(**TINY), **changes)
    message = refusal(tmp_path)
    assert said in message and str(tmp_path) in message


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 3])
def test_a_teacher_of_other_patches_is_itself_in_2d(tmp_path, patch):
    expert = write_transformer_folder(tmp_path, **TINY, patch_size=(1, patch, patch))
    model, _ = project_teacher(tmp_path)
    assert model.config.patch_size == patch
    latents = torch.randn(2, 16, 2 * patch, 3 * patch, generator=torch.Generator().manual_seed(0))
    given = (latents, torch.tensor([100.0, 900.0]), torch.ones(2, 5, 20))
    assert relative_error(model(*given), oracle_velocity(expert, *given)) <= MAX_ERROR


# file, change, what the refusal says after the file's name
WRONG_VALUES = {
    "head_dim": ("transformer/config.json", {"attention_head_dim": [12]}, "is [12]; allowed: a whole number"),
    "boundary": ("model_index.json", {"boundary_ratio": 2}, "boundary_ratio is 2; allowed: a number from 0 to 1"),
    "transformer_2": ("model_index.json", {"transformer_2": {"a": 1}}, "transformer_2 is {'a': 1}; allowed: a pair"),
    "shift": ("scheduler/scheduler_config.json", {"flow_shift": 0}, "flow_shift is 0; allowed: a number above 0"),
    "means": ("vae/config.json", {"latents_mean": [0.0] * 3}, "latents_mean is [0.0, 0.0, 0.0]; allowed: a list of 16"),
    "channels": ("vae/config.json", {"z_dim": 4}, "z_dim is 4; the teacher's latents have 16 channels"),
    "record": ("teacher_record.json", {"shift": "3"}, "shift is '3'; allowed: a number above 0"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_value_of_the_wrong_kind_is_refused_with_its_file_and_key(teachers, tmp_path, case):
    name, change, said = WRONG_VALUES[case]
    file = shutil.copytree(teachers.one, tmp_path / "copy") / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | change), encoding="utf-8")
    message = refusal(tmp_path / "copy")
    assert said in message and str(file.parent) in message


def test_values_that_are_null_or_left_out_count_as_unknown(teachers, tmp_path):
    shutil.copytree(teachers.one, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "vae" / "config.json", dim_mult=None, scale_factor_spatial=None, latents_mean=None)
    edit_json(tmp_path / "copy" / "scheduler" / "scheduler_config.json", flow_shift=None, shift=4.0)
    wan_files = open_wan_files(tmp_path / "copy")
    assert wan_files.record["shift"] == 4.0 and not {"vae_scale_factor", "latents_mean"} & wan_files.record.keys()
    (tmp_path / "copy" / "transformer" / "config.json").write_text('{"num_attention_heads": 2}')
    assert open_wan_files(tmp_path / "copy").config == open_wan_files(teachers.one).config


Q, FFN, QUANT = "blocks.0.self_attn.q", "blocks.0.ffn.0", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
SCALE = "': the scale of blocks.0.ffn.net.0.proj.weight, [48, 128], has shape"
# Tensors that a file of fp8_scaled weights has beside or in place of its own (None: not at all), and what the refusal says
SPOILT = {
    "a missing tensor": ({"blocks.1.ffn.2.bias": None}, "blocks.1.ffn.net.2.bias"),
    "a missing head": ({"head.head.weight": None}, "looked for"),
    "a wrong shape": ({"blocks.1.cross_attn.k.weight": torch.zeros(128, 64)}, "has shape [128, 64]"),
    "a missing scale": ({f"{FFN}.scale_weight": None}, "blocks.0.ffn.net.0.proj.scale_weight) is missing"),
    "a scale of nothing": ({"blocks.0.ffn.7.scale_weight": torch.ones(1)}, "blocks.0.ffn.7.scale_weight"),
    "a scale of three rows": ({f"{FFN}.scale_weight": torch.ones(3)}, SCALE),
    "a scale of another shape": ({f"{FFN}.scale_weight": torch.ones(6, 4, 1)}, SCALE),
    "a scale of another type": ({f"{FFN}.scale_weight": torch.ones(1, dtype=torch.int8)}, SCALE),
    "two scales": ({f"{FFN}.weight_scale": torch.ones(1)}, f"{FFN}.weight_scale{SCALE}"),
    "another marker": ({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e5m2)}, "says F8_E5M2"),
    "whole numbers": ({f"{FFN}.weight": torch.zeros(48, 128, dtype=torch.int8)}, "I8"),
    "names without end": ({f"x{n}": torch.empty(0) for n in range(20_000)}, "tensors, as no model"),
    "another format": ({f"{FFN}.comfy_quant": QUANT}, "nvfp4"),
    "36 channels": ({"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}, "36 input channels"),
    "FastWan": ({"blocks.0.to_gate_compress.weight": QUANT}, "a FastWan with sparse attention (VSA); use its FullAttn"),
    "SkyReels": ({"fps_embedding.weight": QUANT}, "a SkyReels-V2-DF"),
    "TurboWan": ({"blocks.0.self_attn.attn_op.local_attn.proj_l.weight": QUANT}, "a TurboWan"),
    "AnyFlow": ({"delta_embedding.0.weight": QUANT}, "an AnyFlow"),
    "a LoRA beside": ({f"{Q}.lora_A.weight": QUANT}, f"{Q}.lora_A.weight': a LoRA"),
    "a stranger": ({"blocks.0.other.weight": QUANT}, "blocks.0.other.weight': it is another kind of model"),
    "a marker of some size": ({"model_type.weight": torch.zeros(20)}, "model_type.weight"),
    "another quantisation": ({f"{Q}.weight_absmax": QUANT}, "weights in a quantisation that is not read"),
    "I2V's keys": ({"blocks.0.cross_attn.k_img.weight": QUANT}, "image-to-video"),
    "I2V's embedding": ({"img_emb.proj.0.weight": QUANT}, "image-to-video"),
    "VACE": ({"vace_blocks.0.before_proj.weight": QUANT}, "VACE"),
    "S2V": ({"casual_audio_encoder.encoder.conv.weight": QUANT}, "S2V"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_is_not_whole_or_more_than_a_wan_is_refused_by_name(tmp_path, case):
    path, (changes, said) = tmp_path / "wan.safetensors", SPOILT[case]
    write_single_file(path, prefix="model.diffusion_model.", fp8="scaled", heads=1, ffn_dim=48)
    tensors = load_file(path) | {f"model.diffusion_model.{name}": value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    assert said in refusal(path)
    save_file({"model.input_blocks.0.weight": torch.zeros(4)}, path)
    assert "no Wan transformer" in refusal(path)


def test_a_folder_of_several_models_of_a_damaged_config_or_of_pickles_alone_is_refused(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    message = refusal(tmp_path)
    assert "diffusion_pytorch_model.bin" in message and "pickle" in message
    for seed, name in enumerate(("high", "low")):
        write_single_file(tmp_path / f"{name}.safetensors", heads=1, layers=1, ffn_dim=48, seed=seed)
    message = refusal(tmp_path)
    assert "high.safetensors" in message and "low.safetensors" in message
    for name in ("config.json", "model_index.json", "diffusion_pytorch_model.safetensors.index.json"):
        (tmp_path / name).write_text("{")
        assert name in refusal(tmp_path)
        (tmp_path / name).unlink()


# ---- the hub ----


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder of a hub's repository; only the files that are asked for are copied to the snapshot beside it."""
    import fnmatch

    import huggingface_hub

    repository, snapshot = tmp_path / "repository", tmp_path / "snapshot"

    def snapshot_download(repo_id, allow_patterns, ignore_patterns):
        for path in (path for path in repository.rglob("*") if path.is_file()):
            name = str(path.relative_to(repository))
            is_asked = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if is_asked and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository


def test_a_hub_id_fetches_only_what_is_used(hub):
    write_pipeline_folder(hub, two_experts=True)
    (hub / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (hub / "a.png").write_bytes(b"a picture")
    wan_files = open_wan_files("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert list(wan_files.experts) == ["high", "low"]
    got = hub.parent / "snapshot"
    assert not list(got.rglob("text_encoder/*.safetensors")) and not list(got.rglob("vae/*.safetensors"))
    assert wan_files.text_encoder().encoder == got / "text_encoder"
    assert find_vae(None, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 16) == got / "vae"
    assert not list(got.rglob("*.bin")) and not list(got.rglob("*.png"))


def test_an_original_release_on_the_hub_brings_its_encoder_tokenizer_and_vae(hub):
    experts = write_original_two_experts(hub, **TINY)
    for name in ("Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model", "examples/i2v_input.JPG"):
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        (hub / name).write_bytes(b"its content is read later")
    wan_files = open_wan_files("Wan-AI/Wan2.2-T2V-A14B")
    assert [expert.config.depth for expert in wan_files.experts.values()] == [len(e.blocks) for e in experts]
    got = hub.parent / "snapshot"
    assert not list(got.rglob("*.pth"))
    vae = find_vae(None, "Wan-AI/Wan2.2-T2V-A14B", 16)
    with pytest.raises(UserError, match=r"enc-bf16\.pth: is no whole checkpoint"):
        wan_files.text_encoder()
    assert vae == got / "Wan2.1_VAE.pth" and (got / "google/umt5-xxl/spiece.model").is_file()
    assert not list(got.rglob("*.JPG"))


def test_huggingface_hub_is_imported_only_for_a_hub_id(tmp_path, monkeypatch):
    write_original_folder(tmp_path, **TINY)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert open_wan_files(tmp_path).config.depth == 2
