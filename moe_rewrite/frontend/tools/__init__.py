"""What tools of transformers and the Hub ask of a converted model."""
