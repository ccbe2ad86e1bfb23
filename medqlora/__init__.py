"""medqlora: QLoRA fine-tuning of language models for medical question answering, and its honest
evaluation.
"""

import logging

__version__ = "0.1.0"

# bitsandbytes warns at import when an optional inference kernel is missing; training does not use
# it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
