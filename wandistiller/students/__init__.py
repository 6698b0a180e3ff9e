"""Here is what a student's folder records, where that leads (teacher, text encoder, VAE), and what can be asked of the student."""
