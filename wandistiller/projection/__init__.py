"""3D -> 2D -> 3D: selection, projection, LoRAs of a teacher for a student, lifting, and formats for other tools."""
