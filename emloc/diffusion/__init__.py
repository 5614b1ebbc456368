"""Diffusion pipelines: their files, encodings, training, pictures. What differs from one family to
the next is in `emloc.families.diffusion`."""
