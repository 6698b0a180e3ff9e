"""Here a 3D Wan becomes a 2D model and a student a Wan again: selection, projection, lifting, and formats for other tools.

It may import sampling, wan, model and files."""
