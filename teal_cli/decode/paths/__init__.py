"""Ways to decode a token, behind one interface."""
