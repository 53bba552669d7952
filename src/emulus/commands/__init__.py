"""command line -> everything else. One function per verb; each takes the words after it."""
