"""Shipped recipes, one YAML each."""
