"""What a trained model is worth, and pictures and pages that show it."""
