"""The 2D transformer and its config: what it computes and how large it is, with no knowledge of training or of Wan's files."""
