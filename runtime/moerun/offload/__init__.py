"""The stock transformers model with its experts taken from slots, and its gates listened to."""
