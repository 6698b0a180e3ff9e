"""What a student learns from: training states x_sigma, and the teacher's answers at them, live, replayed or from a cache.

states.py is the way in to the sources of states, answers.py to the sources of answers. A lane is one sample of the global
batch, from the first step to the last (see lanes.py). The package may import projection, sampling, wan, model and files.
"""
