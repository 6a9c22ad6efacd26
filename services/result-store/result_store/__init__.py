"""Store scan results and serve the views over them."""
