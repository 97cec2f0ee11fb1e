"""The analysis: which dimension of which value holds tokens, and what a rank keeps of it. Knows no operator."""
