"""The distillation loop and what it moves: objective, feature loss, optimiser, the state of a run and its checkpoints.

It may import walk and what lies below them, but neither run nor budget.
"""
