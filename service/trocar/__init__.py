"""The network side of Trocar: a gRPC streaming server and its client."""
