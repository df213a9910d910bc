"""The embedded model's weights, its prompts, README pictures."""
