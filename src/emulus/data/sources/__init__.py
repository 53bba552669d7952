"""How data sets are found and read: files -> rows and samples -> items, with an account of what is left out."""
