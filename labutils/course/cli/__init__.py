"""What `python -m labutils` runs: one module per command, each importing only the standard library at its top."""
