"""What is known about operators: how they may be cut over ranks, and what they cost."""
