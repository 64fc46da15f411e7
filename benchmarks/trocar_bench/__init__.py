"""Benchmarks of Trocar: speed, accuracy and the metrics they share."""
