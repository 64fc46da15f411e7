"""Training SAM2S: synthetic surgery, simulated clicks, losses and the training loop."""
