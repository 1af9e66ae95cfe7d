"""Find normalization calls, capture graphs, and put filters in."""
