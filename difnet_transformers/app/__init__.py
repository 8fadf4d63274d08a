"""`difnet app`: a page for people and endpoints for programs around one or more captioners."""
