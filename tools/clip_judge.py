"""The cosine of picture and prompt by a CLIP or SigLIP of transformers, for `evaluate_student.py --judge`.

CLIP=openai/clip-vit-large-patch14 python evaluate_student.py --judge tools/clip_judge.py:cosines ...
"""

import os
from functools import cache


@cache
def load_clip(location: str):
    """Load a model and its processor from a folder or hub id; only safetensors are read."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(location, use_safetensors=True)  # nosec B615 # what CLIP names, by the person
    return model.eval(), AutoProcessor.from_pretrained(location)  # nosec B615


def cosines(pictures, prompts) -> list[dict[str, float]]:
    """Return the cosine of each picture (N, H, W, 3) uint8 to its prompt; the end of a long prompt is cut."""
    import torch
    from PIL import Image

    model, processor = load_clip(os.environ["CLIP"])
    images = [Image.fromarray(picture) for picture in pictures]
    # A SigLIP was trained with every text filled up, and a CLIP does not see what comes after the end of its text:
    slots = model.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": slots, "return_tensors": "pt"}
    with torch.inference_mode():
        given = processor(text=list(prompts), images=images, **options)
        answer = model(**given)
        found = torch.cosine_similarity(answer.image_embeds, answer.text_embeds)
    return [{"clip": cosine} for cosine in found.tolist()]
