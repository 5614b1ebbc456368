"""Diffusion pipelines: their files, encodings, training, pictures. What differs from one family to
the next is in `emloc.families.diffusion`."""

from emloc.quiet import quiet_libraries

with (
    quiet_libraries()
):  # diffusers' pipelines ask for picture processors, which tell of torchvision
    from transformers import CLIPImageProcessor, SiglipImageProcessor  # noqa: F401
