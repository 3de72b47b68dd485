"""Files and texts that nobody should send, and what every door does with them."""
