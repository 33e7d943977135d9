"""Models: loading any Hugging Face causal LM, the course's own, their quantized decoders, file formats, evaluation."""
