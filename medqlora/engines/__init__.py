"""Engines that run a model: token ids in, option log-probabilities or text out."""
