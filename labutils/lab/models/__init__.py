"""Models: loading any Hugging Face causal LM, and training and evaluating the course's own."""
