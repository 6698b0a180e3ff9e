"""Here is measured how close a student is to its teacher: measures, errors at held-out states, judges of pictures.

It may import projection, sampling, wan, model and files."""
