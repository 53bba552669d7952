"""Longer checks and the making of what is shipped; each is run by itself."""
