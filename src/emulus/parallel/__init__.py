"""a plain module -> the same module spread over processes. Nothing else knows how many there are."""
