"""Chapter 01: a model speaks. Sampling, the KV cache, prefill and decode, streaming, a plain fast Llama."""
