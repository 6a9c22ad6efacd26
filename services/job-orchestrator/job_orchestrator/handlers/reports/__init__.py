"""Handle reports on chunks: of the workers that scan them, and of result-store, which checks them."""
