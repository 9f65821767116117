"""The W&B mirror: a process that copies metrics.jsonl to Weights & Biases, and the training's side of it."""
