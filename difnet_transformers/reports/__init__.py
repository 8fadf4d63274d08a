"""Charts, pages and figures."""
