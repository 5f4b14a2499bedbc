"""The wire: ranks, what they tell each other, and what a message costs."""
