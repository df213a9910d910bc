"""Drives a pipeline with a kernel and writes down the transitions that are trained."""
