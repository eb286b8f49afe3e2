"""Commands and what they need; nothing imports them."""
