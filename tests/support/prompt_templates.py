"""Prompt templates of the demo's world, with wildcards, weights and choices, as a person writes them into a folder."""

from pathlib import Path

WILDCARDS = {
    "size": ["small", "large", "2::big"],
    "colour": ["red", "blue", "green", "yellow", "purple", "orange"],
    "things/shape": ["circle", "square", "triangle", "ring", "cross"],
    "place": ["on the left", "on the right", "at the top", "at the bottom", "in the center"],
    "ground": ["white", "black", "gray", "brown", "pink"],
}
TEMPLATES = [
    "# One shape, or two beside each other",
    "{a|a picture of a} __size__ __colour__ __things/shape__ __place__, {on a __ground__ background|__ground__ background}",
    "a __ground__ background with a __size__ __colour__ __things/shape__ on the left and a __size__ __colour__ __things/shape__ on the "
    "right",
]


def write_templates(folder: Path) -> Path:
    for name, lines in {"world.template": TEMPLATES, **WILDCARDS}.items():
        file = folder / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
