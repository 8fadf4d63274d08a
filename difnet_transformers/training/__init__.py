"""Cross-entropy and self-critical training."""
