"""EMLoC: fine-tune a large model in the memory that running it needs (arXiv 2506.12015).

Importing this package teaches transformers and diffusers to load emulator checkpoints, so that
`AutoModelForCausalLM.from_pretrained(emulator_folder)` and
`FluxTransformer2DModel.from_pretrained(emulator_folder)` work like for any other checkpoint.
"""

import emloc.quiet  # first: diffusers imports bitsandbytes, if it is there
from emloc import lowrank_diffusers
from emloc.lowrank import LowRankLinear, register

with (
    emloc.quiet.quiet_libraries()
):  # diffusers' pipelines import these, which tell at length of torchvision
    from transformers import CLIPImageProcessor, SiglipImageProcessor  # noqa: F401

__all__ = ["LowRankLinear"]
__version__ = "0.1.0"

register()
lowrank_diffusers.register()
