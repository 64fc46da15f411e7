"""The model side of Trocar: SAM2S as a streaming tracker, usable as a library without the service."""
