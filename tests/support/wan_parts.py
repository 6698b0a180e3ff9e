"""Text encoders and VAEs of a Wan under the names of the original releases and ComfyUI, written apart from the code under test."""

import io
import re

import torch

from support.wan_folders import random_weights

VAE_SHAPES = {
    "2.1": {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
}


def make_vae(release: str, **settings):
    """A tiny AutoencoderKLWan of a release's structure with random weights."""
    from diffusers import AutoencoderKLWan

    shape = VAE_SHAPES[release]
    vae = AutoencoderKLWan(**shape, **settings)
    random_weights(vae, seed=0)
    return vae.eval()


def vae_to_original(name: str, release: str) -> str:
    """Return the original release's name of a diffusers tensor (Wan2.2:wan/modules/vae2_1.py, vae2_2.py)."""
    for pattern, other in [
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
        (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.norm1\.", ".residual.0."),
        (r"\.conv1\.(?=\w+$)(?<!coder\.conv1\.)", ".residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
    ]:
        name = re.sub(pattern, other, name)
    if release == "2.2":
        name = re.sub(r"down_blocks\.(\d)\.(?:resnets\.(\d)|downsampler)\.", lambda m: _stage("down", m, 2), name)
        return re.sub(r"up_blocks\.(\d)\.(?:resnets\.(\d)|upsampler)\.", lambda m: _stage("up", m, 3), name)
    name = name.replace("down_blocks.", "downsamples.")
    # A stage of the decoder has three residual blocks and, but for the last, an upsampler.
    return re.sub(
        r"up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.",
        lambda m: f"upsamples.{4 * int(m[1]) + (3 if m[2] is None else int(m[2]))}.",
        name,
    )


def _stage(side: str, match: re.Match, num_blocks: int) -> str:
    return f"{side}samples.{match[1]}.{side}samples.{num_blocks if match[2] is None else match[2]}."


def umt5_to_original(name: str) -> str:
    """Return the original release's name of a transformers tensor (Wan2.1:wan/modules/t5.py)."""
    for pattern, other in [
        (r"^shared\.", "token_embedding."),
        (r"^encoder\.final_layer_norm\.", "norm."),
        (r"^encoder\.block\.(\d+)\.layer\.", r"blocks.\1."),
        (r"\.0\.layer_norm\.", ".norm1."),
        (r"\.1\.layer_norm\.", ".norm2."),
        (r"\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
        (r"\.0\.SelfAttention\.", ".attn."),
        (r"\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
        (r"\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
        (r"\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
    ]:
        name = re.sub(pattern, other, name)
    return name


def scaled(tensors: dict, blocks: bool = False) -> tuple[dict, dict]:
    """Return tensors as ComfyUI's fp8_scaled file has them, and what they mean."""
    stored, meant = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in tensors.items():
        stored[name] = meant[name] = tensor
        if "SelfAttention" in name or ("DenseReluDense" in name and "relative" not in name):
            scale = torch.rand(tensor.shape[0], 2) + 0.5 if blocks else tensor.abs().max() / 448
            stored[name] = (tensor / scale.max()).to(torch.float8_e4m3fn)
            spread = scale.repeat_interleave(tensor.shape[1] // 2, 1) if blocks else scale
            stored[name.replace("weight", "scale_weight")], meant[name] = scale, stored[name].float() * spread
    return stored, meant


def sentencepiece_model() -> bytes:
    """Train SentencePiece itself on some lines, with UMT5's places of <pad> and </s>."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox in the snow", "a blue boat at sea", "golden light"] * 50),
        model_writer=model,
        vocab_size=24,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()
