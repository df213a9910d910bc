"""World video1: one coloured shape that moves in a straight line over five frames of 24x24 pixels; the caption tells how.

Frozen: results in docs/results hang on it. A change to clips, sentences or splits is a new world.
"""
