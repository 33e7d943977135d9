"""Generation from naive to fast: sampling, KV caches, the verbs of decoding, streaming, a plain fast Llama."""
