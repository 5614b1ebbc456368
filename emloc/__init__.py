"""EMLoC: fine-tune a large model in the memory that running it needs (arXiv 2506.12015).

Importing this package teaches transformers to load emulator checkpoints, so that
`AutoModelForCausalLM.from_pretrained(emulator_folder)` works like for any other checkpoint.
"""

from emloc.lowrank import LowRankLinear, register

__all__ = ["LowRankLinear"]
__version__ = "0.1.0"

register()
