"""Prompt readers (``prompts``) and the sampler that draws groups from them (``sampler``)."""
