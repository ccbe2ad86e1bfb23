"""medqlora: QLoRA fine-tuning of language models for medical question answering, and its honest evaluation."""

__version__ = "0.1.0"
