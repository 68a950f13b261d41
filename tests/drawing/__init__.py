"""A tiny SDXL that draws what its prompt says: coloured shapes at places. See train.py."""
