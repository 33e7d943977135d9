"""Labs on LLM inference acceleration: what the course teaches, tested, and the machinery that teaches it."""

__version__ = "0.1.0"
