"""Here a student and its teacher draw, and it is measured how close they are: measures, errors at held-out states, judges of pictures."""
