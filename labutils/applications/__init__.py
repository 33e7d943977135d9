"""Chapter 12: what people want. Tasks judged by parsed structure, retrieval, tools, and whether a metric is kept."""
