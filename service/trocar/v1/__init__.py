"""Generated from proto/trocar/v1/tracking.proto by proto/generate.py; this file alone is hand-written."""
