"""`difnet demo`: a drawn corpus, from drawing to captions."""
