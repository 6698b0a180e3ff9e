"""Prompts: the files of captions and the templates that they come from, and how Wan cleans each."""
