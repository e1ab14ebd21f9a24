"""Networks that change their shape by an argument of their forward. Torch alone; nothing of a method or a run."""
