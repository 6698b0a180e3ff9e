"""What a student learns from: the teacher walks sampling paths (walk.py), its answers fill a store, and steps draw from that."""
