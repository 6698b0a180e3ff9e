"""One run of the trainer: its flags, what is known before a weight is read, what it is built of, what it says and records."""
