"""satchel's generator: layers, losses and features, written once as mathematics, become a PyTorch package."""
