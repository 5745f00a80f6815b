"""The command `8080`: a thin layer of words and formats over the SDK."""
