"""What a person watches or keeps of a run: metrics, progress, plots, trackers, sample pictures, tables, the gallery, cards of exports."""
