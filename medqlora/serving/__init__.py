"""New questions are put to a model, with a confidence and a reminder beside each answer."""
