"""What was found in a graph, what was done with it, and what was not done and why."""
