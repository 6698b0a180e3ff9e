"""Here are the noise levels, teacher and student as velocity fields, and the sampler."""
