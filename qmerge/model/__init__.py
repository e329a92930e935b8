"""The model as transformers builds it, walked one decoder layer at a time."""
