"""Programs that run other `difnet` commands one after another."""
