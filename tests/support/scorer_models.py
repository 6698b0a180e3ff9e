"""Tiny scorers of transformers' real classes with random weights, in folders as transformers saves them."""

from pathlib import Path

import torch

from support.wan_folders import tiny_tokenizer

PIXELS = 32
TRANSFORMER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TRANSFORMER | {"image_size": PIXELS, "patch_size": 8}
TEXT_SLOTS = {"clip": 24, "siglip": 64}


def clip_tokenizer():
    """Return a CLIP tokenizer of single characters, without merges."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])


def save_scorer(kind: str, folder: Path, seed: int = 0):
    """Write a model with its processor and return the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"clip": save_clip, "siglip": save_siglip, "dino": save_dino}[kind](folder)
    return model.eval()


def with_larger_weights(model):
    """Make the answers differ: with the initial weights of transformers all pictures look alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "logit" not in name:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


def save_clip(folder: Path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = clip_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = TRANSFORMER | {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_SLOTS["clip"]}
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end, "projection_dim": 12}
    config = CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 12}, projection_dim=12)
    model = with_larger_weights(CLIPModel(config))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
    CLIPProcessor(image_processor=CLIPImageProcessor(**sizes), tokenizer=tokenizer).save_pretrained(folder)
    return model


def save_siglip(folder: Path):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    tokenizer = tiny_tokenizer()
    text = TRANSFORMER | {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_SLOTS["siglip"]}
    model = with_larger_weights(
        SiglipModel(SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=VISION))
    )
    model.save_pretrained(folder)
    image_processor = SiglipImageProcessor(size={"height": PIXELS, "width": PIXELS})
    SiglipProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return model


def save_dino(folder: Path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": PIXELS, "patch_size": 8}
    model = with_larger_weights(Dinov2Model(Dinov2Config(**shape)))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
    BitImageProcessor(**sizes).save_pretrained(folder)
    return model
