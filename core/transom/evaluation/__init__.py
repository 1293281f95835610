"""Evaluates loaded models: against another program, by attention head, and by the share of keys that are read."""
