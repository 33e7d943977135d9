"""Models and data: the text, the corpora and the checkpoints that the course measures on."""
