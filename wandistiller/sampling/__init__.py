"""Teacher and student as velocity fields, the noise levels they are asked at, and the sampler that draws with them.

It may import wan, model and files."""
