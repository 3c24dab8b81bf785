"""What runs where, with which batch, and what it will cost."""
