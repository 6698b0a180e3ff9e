"""What a person watches or keeps of a run: metrics, progress, plots, trackers, sample pictures, cards, tables, the gallery,
and the playground.

It may import evaluation, walk, projection, sampling, wan, model and files, but nothing that trains.
"""
