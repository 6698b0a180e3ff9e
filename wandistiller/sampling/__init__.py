"""Here are the noise levels, teacher and student as velocity fields, the sampler, and what a student records for drawing.

It may import wan, model and files."""
