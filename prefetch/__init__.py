"""Have weights in memory before the loader asks for them."""
