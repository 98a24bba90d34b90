"""Part-aware self-supervised pre-training for person re-identification, on Ray."""
