"""Several processes as one run: which of them this is, how they meet, how one machine starts them."""
