"""Chapter 04: zeros. Which weights go, what the rest must do for them, and which zeros buy time."""
