"""Scribbling in the browser with a model in the loop: the strokes, the page, the models, and what comes out.

The rooms below are imported when they are asked for: the page must not wait for PyTorch.
"""
