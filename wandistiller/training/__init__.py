"""The distillation loop and what it moves: objective, feature loss, optimiser, the state of a run and its checkpoints."""
