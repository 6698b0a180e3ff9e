"""From a 3D Wan to a 2D model and back: selection, projection, lifting, and the formats that other tools load.

It may import sampling, wan, model and files."""
