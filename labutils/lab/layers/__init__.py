"""A model's linear layers as every compression method sees them: found, read, replaced, and watched at work."""
