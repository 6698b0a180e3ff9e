"""What a student learns from: training states x_sigma, and the teacher's answers at them, live, replayed or from a cache.

It may import projection, sampling, wan, model and files."""
