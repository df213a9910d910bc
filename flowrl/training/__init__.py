"""One readable iteration: draw, roll out, score, assign credit, update."""
