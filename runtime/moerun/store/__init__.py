"""The expert store: what is packed, how it is indexed, found and read."""
