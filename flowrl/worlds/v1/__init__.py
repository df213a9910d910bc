"""World v1: up to four coloured shapes on a 3x3 grid of cells, 36x36 pixels, captioned in the GenEval manner.

Frozen: results in docs/results hang on it. A change to pictures, sentences or splits is a new world.
"""
