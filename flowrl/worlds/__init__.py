"""Embedded worlds: each has a renderer, captions, GenEval-style metadata, held-out splits and a detector; versioned."""
