"""Runtimes that execute the network's stages: eager PyTorch and ONNX Runtime."""
