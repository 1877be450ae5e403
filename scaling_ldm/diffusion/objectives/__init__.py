"""What is minimised in training, and what is measured on held-out pictures."""
