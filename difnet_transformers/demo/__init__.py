"""`difnet demo`: the whole way from drawn scenes to a page of captions. `run.py` has the steps."""
