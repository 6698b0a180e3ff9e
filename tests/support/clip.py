"""A tiny CLIP of transformers' real classes with random weights, in a folder as transformers saves it."""

from pathlib import Path

import torch


def save_clip(folder: Path):
    """Save and return the model and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_dim": 12}
    text |= size | {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = size | {"image_size": 32, "patch_size": 8, "projection_dim": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
        with torch.no_grad():  # with the initial weights of transformers all pictures look alike
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "logit" not in name:
                    parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
