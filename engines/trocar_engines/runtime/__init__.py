"""Runtimes that execute the network's stages: PyTorch, ONNX Runtime, OpenVINO, CUDA graphs, TensorRT."""
