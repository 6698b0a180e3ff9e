"""Tiny Wans on disk with the true structure, written by diffusers itself where it can, and their oracle.

Every writer returns the diffusers `WanTransformer3DModel` (or two) whose weights the files really hold, after fp8 rounding
where there is some. `oracle_velocity` runs such a model at one frame over all zero-padded text slots, as WanPipeline does.
"""

import json
import re
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

torch.set_num_threads(1)  # for tiny tensors on a busy machine a second thread costs five times what it saves
TEXT_SLOTS = 512  # of every released Wan
TINY_SHAPE = {"heads": 2, "head_dim": 12, "layers": 3, "ffn_dim": 40, "channels": 16, "text_dim": 20}

# Patterns of canonical (diffusers') names and their original spelling, written down apart from the code under test.
_TO_ORIGINAL = [
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
]


def to_original(name: str) -> str:
    """Return the original Wan name of a diffusers tensor."""
    for pattern, replacement in _TO_ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def random_weights(model, seed: int) -> None:
    """Fill a model with seeded values that keep activations near unit size and let every tensor matter.

    Default initial values would hide mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                values = 0.3 * values + (1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("scale_shift_table"):
                values = 0.5 * values
            elif name.endswith("bias"):
                values = 0.2 * values
            else:
                values = values / values[0].numel() ** 0.5
            parameter.copy_(values)


def random_transformer(*, seed: int = 0, **shape):
    """Make a tiny Wan text-to-video transformer of diffusers in float32 with random weights.

    Args:
        shape: values to replace in TINY_SHAPE, or more arguments of diffusers' class.
    """
    from diffusers import WanTransformer3DModel

    shape = TINY_SHAPE | shape
    channels = shape.pop("channels")
    model = WanTransformer3DModel(
        num_attention_heads=shape.pop("heads"),
        attention_head_dim=shape.pop("head_dim"),
        num_layers=shape.pop("layers"),
        in_channels=channels,
        out_channels=channels,
        **shape,
    )
    random_weights(model, seed)
    return model.eval()


def with_weights(model, tensors: dict[str, Tensor]):
    """Return a diffusers transformer of the shape of `model` with other weights."""
    from diffusers import WanTransformer3DModel

    other = WanTransformer3DModel.from_config(model.config)
    other.load_state_dict(tensors)
    return other.eval()


@torch.no_grad()
def oracle_velocity(
    model, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor | None = None
) -> Tensor:
    """Run diffusers' 3D transformer at one frame; with lengths the text is zero-padded to all slots, as by WanPipeline."""
    if prompt_lengths is not None:
        slots = prompt_embeds.new_zeros(len(prompt_embeds), TEXT_SLOTS, prompt_embeds.shape[-1])
        for row, (embeds, length) in enumerate(zip(prompt_embeds, prompt_lengths.tolist(), strict=True)):
            slots[row, :length] = embeds[:length]
        prompt_embeds = slots
    return model(latents[:, :, None], timestep, prompt_embeds, return_dict=False)[0][:, :, 0]


def inputs(channels: int = 16, text_dim: int = 20) -> tuple[Tensor, ...]:
    """Non-square latents, timesteps between whole numbers, and the embeds of two prompts of 3 and 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, channels, 4, 6, generator=generator)
    prompt_embeds = torch.randn(2, 9, text_dim, generator=generator)
    return latents, torch.tensor([12.5, 987.6]), prompt_embeds, torch.tensor([3, 9])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest |actual - expected| / |expected| of a batch."""
    difference = (actual.double() - expected.double()).flatten(1).norm(dim=1)
    return float((difference / expected.double().flatten(1).norm(dim=1)).max())


def write_pipeline_folder(
    path: str | Path,
    *,
    two_experts: bool = False,
    boundary_ratio: float = 0.875,
    flow_shift: float = 3.0,
    seed: int = 0,
    max_shard_size: str | int = "10GB",
    **shape,
) -> list:
    """Write a whole Wan pipeline folder with diffusers: one or two transformers, UMT5, tokenizer, VAE, scheduler.

    Args:
        shape: values to replace in TINY_SHAPE, or more arguments of diffusers' class.

    Returns:
        The transformers: [the only one] or [high noise, low noise].
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline

    shape = TINY_SHAPE | shape
    experts = [random_transformer(**shape, seed=seed + i) for i in range(2 if two_experts else 1)]
    tokenizer = tiny_tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_text_encoder(len(tokenizer), shape["text_dim"], seed),
        vae=tiny_vae(shape["channels"], seed),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
        ),
        transformer=experts[0],
        transformer_2=experts[1] if two_experts else None,
        boundary_ratio=boundary_ratio if two_experts else None,
    )
    pipeline.save_pretrained(path, max_shard_size=max_shard_size)
    return experts


def tiny_tokenizer():
    """Return a T5-like tokenizer of single characters: pad id 0, </s> appended, spaces as the T5 mark."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_SLOTS)


def tiny_text_encoder(vocab_size: int, text_dim: int, seed: int):
    from transformers import UMT5Config, UMT5EncoderModel

    shape = {"d_model": text_dim, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **shape)).eval()


def tiny_vae(channels: int, seed: int):
    """Return a VAE of Wan2.1's structure for 16 channels, or of Wan2.2's (patches of 2, factor 16) for 48."""
    from diffusers import AutoencoderKLWan

    settings = {"z_dim": channels, "base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    generator = torch.Generator().manual_seed(seed)
    settings["latents_mean"] = torch.randn(channels, generator=generator).tolist()
    settings["latents_std"] = (0.5 + torch.rand(channels, generator=generator)).tolist()
    if channels == 48:
        settings |= {"patch_size": 2, "scale_factor_spatial": 16, "in_channels": 12, "out_channels": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(**settings)


def write_transformer_folder(path: str | Path, *, max_shard_size: str | int = "10GB", dtype=torch.float32, **shape):
    """Write a bare diffusers transformer folder."""
    model = random_transformer(**shape)
    held = with_weights(model, {name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()})
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return held


def original_settings(model) -> dict:
    """Return a config.json as the original releases have it; theirs does not say text_dim or patch_size either."""
    config = model.config
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": config.num_attention_heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "ti2v" if config.in_channels == 48 else "t2v",
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": TEXT_SLOTS,
    }


def original_tensors(model) -> dict[str, Tensor]:
    return {to_original(name): tensor.clone() for name, tensor in model.state_dict().items()}


def write_original_transformer(folder: Path, model, *, num_shards: int = 1, **settings) -> None:
    """Write one transformer with original names; `settings` replace entries of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(original_settings(model) | settings), encoding="utf-8")
    tensors = original_tensors(model)
    if num_shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        name = f"diffusion_pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_original_folder(path: str | Path, *, num_shards: int = 1, **shape):
    """Write an original Wan2.1 or TI2V folder with its pickled text encoder, a stand-in that nobody may open."""
    model = random_transformer(**shape)
    write_original_transformer(Path(path), model, num_shards=num_shards)
    (Path(path) / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"not a pickle")
    return model


def write_original_two_experts(path: str | Path, *, seed: int = 0, num_shards: int = 1, **shape) -> list:
    """Write an original Wan2.2-A14B folder: high_noise_model/ and low_noise_model/."""
    experts = [random_transformer(**shape, seed=seed + i) for i in range(2)]
    for side, model in zip(("high", "low"), experts, strict=True):
        write_original_transformer(Path(path) / f"{side}_noise_model", model, num_shards=num_shards)
    (Path(path) / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"not a pickle")
    return experts


def write_single_file(path: str | Path, *, prefix: str = "", fp8: str | None = None, model=None, **shape):
    """Write one safetensors file with original names, as ComfyUI has it.

    Args:
        prefix: "" or "model.diffusion_model.".
        fp8: "plain" casts the Linear weights; "scaled" is ComfyUI's fp8_scaled (scale_weight and a scaled_fp8 marker);
            "comfy_quant" is its newer form (weight_scale and a JSON tensor per layer).
    """
    model = model or random_transformer(**{"head_dim": 128, "layers": 2} | shape)
    file_tensors, held = {}, {}
    for name, tensor in model.state_dict().items():
        is_linear = tensor.ndim == 2 and name.startswith("blocks.")
        stored = _quantised(tensor, fp8) if fp8 and is_linear else {"weight": tensor.clone()}
        held[name] = stored.pop("held", tensor)
        original = to_original(name)
        file_tensors[original] = stored.pop("weight")
        for key, value in stored.items():
            file_tensors[f"{original.removesuffix('.weight')}.{key}"] = value
    if fp8 == "scaled":
        file_tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({prefix + name: tensor for name, tensor in file_tensors.items()}, path, metadata={"format": "pt"})
    return with_weights(model, held)


def _quantised(weight: Tensor, fp8: str) -> dict[str, Tensor]:
    """Return the tensors that stand for a quantised Linear weight, and under "held" the float32 weight they mean."""
    if fp8 == "plain":
        stored = weight.to(torch.float8_e4m3fn)
        return {"weight": stored, "held": stored.float()}
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    stored = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": stored, "held": stored.float() * scale}
    if fp8 == "scaled":
        return tensors | {"scale_weight": scale, "scale_input": torch.tensor(1.5)}
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return tensors | {"weight_scale": scale, "input_scale": torch.tensor(1.5), "comfy_quant": marker}


# These write checkpoints in full size that take no disk.
STORED_BYTES = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F32": 4}
A14B_SHAPE = {"hidden_size": 5120, "num_heads": 40, "ffn_dim": 13824, "depth": 40, "num_channels": 16}


def write_hollow_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, others: dict[str, str] | None = None, first: bytes = b""
) -> int:
    """Write a safetensors file with a true header whose data is a hole, behind the `first` bytes; return the bytes of its tensors.

    Args:
        others: types of tensors that are not of `dtype`.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        kind = (others or {}).get(name, dtype)
        start, end = end, end + STORED_BYTES[kind] * prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + first)
        file.truncate(8 + len(text) + end)
    return end


def write_hollow_shards(
    folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], dtype: str, num_shards: int
) -> int:
    """Write such files as shards with their index; return the bytes of their tensors."""
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for shard in range(num_shards):
        names = [name for i, name in enumerate(shapes) if i * num_shards // len(shapes) == shard]
        file_name = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        total += write_hollow_file(folder / file_name, {name: shapes[name] for name in names}, dtype)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def write_hollow_transformer(folder: Path, config, *, dtype: str, num_shards: int) -> tuple[int, int]:
    """Write a sharded transformer of this shape whose files are holes; return the bytes of all and of its largest tensor."""
    from wandistiller.wan.transformer_files import teacher_tensor_shapes

    shapes = teacher_tensor_shapes(config)
    total = write_hollow_shards(folder, "diffusion_pytorch_model", shapes, dtype, num_shards)
    return total, STORED_BYTES[dtype] * max(map(prod, shapes.values()))


def umt5_xxl_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the encoder that all released Wans share (google/umt5-xxl)."""
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (256384, 4096)}
    for layer in range(24):
        block = f"encoder.block.{layer}.layer"
        shapes |= {f"{block}.0.SelfAttention.{name}.weight": (4096, 4096) for name in "qkvo"}
        shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        shapes |= {f"{block}.1.DenseReluDense.{name}.weight": (10240, 4096) for name in ("wi_0", "wi_1")}
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (4096, 10240)
        shapes |= {f"{block}.{index}.layer_norm.weight": (4096,) for index in range(2)}
    return shapes | {"encoder.final_layer_norm.weight": (4096,)}


def write_hollow_a14b(path: Path) -> None:
    """Write Wan2.2-T2V-A14B in full size as a pipeline folder: two experts and UMT5-XXL with true headers and no data."""
    from wandistiller.model.config import StudentConfig

    config = StudentConfig(block="wan", image_size=512, **A14B_SHAPE)
    settings = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824}
    settings |= {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "eps": 1e-6}
    for name in ("transformer", "transformer_2"):
        write_hollow_transformer(path / name, config, dtype="BF16", num_shards=12)
        (path / name / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"} | settings))
    write_hollow_shards(path / "text_encoder", "model", umt5_xxl_shapes(), "BF16", 3)
    (path / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "umt5", "d_model": 4096}))
    tiny_tokenizer().save_pretrained(path / "tokenizer")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 3.0}))
    (path / "vae").mkdir()
    (path / "vae" / "config.json").write_text(json.dumps({"dim_mult": [1, 2, 4, 4]}))
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    index |= {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    (path / "model_index.json").write_text(json.dumps(index))
