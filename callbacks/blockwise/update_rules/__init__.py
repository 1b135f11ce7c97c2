"""Which of q, k and v keep their weights: the rules and the attention probe."""
