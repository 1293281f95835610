"""Writes the rows of results as tables of Markdown, one benchmark a file."""
