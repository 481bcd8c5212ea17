"""What a reader runs from a checkout: training, figures and the numbers that README shows."""
