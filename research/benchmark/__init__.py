"""Time and memory of this project's parts, side by side with the plain way to do the same."""
