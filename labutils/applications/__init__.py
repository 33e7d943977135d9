"""Applications: tasks judged by parsed structure, extraction, retrieval, tools, and whether a metric is kept."""
