"""Here is what a student's folder records, where that leads (teacher, text encoder, VAE), and drawing with a student or its teacher.

It may import sampling, wan, model, prompts and files."""
