"""Texts: the service's dialogues and their grammar, held-out modules, and compressors as a yardstick."""
