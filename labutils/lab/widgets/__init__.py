"""Interactive versions for Jupyter, each with a static figure beside it and a plain function instead."""
